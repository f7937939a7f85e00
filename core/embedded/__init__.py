"""A small trained model inside the package, for demonstrations and tests without a download.

`PIPELINE` is a diffusers folder: 16x16 handwritten digits, sampled with `DDIMPipeline`.
"""

from pathlib import Path

from errata.embedded.features import load_features, reference_features, reference_statistics

PIPELINE: Path = Path(__file__).parent / "digits"
"""Folder for `DDIMPipeline.from_pretrained`; `training.json` inside says how it was trained."""

__all__ = ["PIPELINE", "load_features", "reference_features", "reference_statistics"]
