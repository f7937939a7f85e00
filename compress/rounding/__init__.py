"""Learned rounding: block by block, on recorded inputs of mixed steps."""
