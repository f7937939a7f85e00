"""Compress: a float diffusers pipeline becomes a simulated low-bit, cached one.

`apply` needs the pipeline, its trajectories (`errata.calibration`) and a `Recipe`.
"""

from errata.compress.compressed import CompressedPipeline, load
from errata.compress.recipe import DeepCache, Quantization, Recipe
from errata.compress.schedule import CacheSchedule
from errata.compress.workflow import apply

__all__ = ["CacheSchedule", "CompressedPipeline", "DeepCache", "Quantization", "Recipe", "apply", "load"]
