"""What to do to a model, written down: bits, rounding, cache, and their names."""
