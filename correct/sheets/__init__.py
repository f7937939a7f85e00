"""Errata sheets: what one holds, its file, and how it is fitted."""
