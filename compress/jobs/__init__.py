"""A long compression: what is checked first, kept on the way, told, and taken over from an earlier one."""
