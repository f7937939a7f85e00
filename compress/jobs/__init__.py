"""Compression as a long job: checks before it, progress, finished stages, a dry run."""
