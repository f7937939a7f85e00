"""The cache that fits a model: which steps are full, and how reused features are corrected."""
