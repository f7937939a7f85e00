"""Compress: a float diffusers pipeline becomes a simulated low-bit, cached one.

`apply` needs the pipeline, its trajectories (`errata.calibration`) and a `Recipe`.
"""

from errata.compress.caching import CacheQuant, DeepCache
from errata.compress.compressed import CompressedPipeline, load
from errata.compress.progress import BlockReport
from errata.compress.quantization import LearnedRounding, Quantization
from errata.compress.recipe import Recipe
from errata.compress.schedule import CacheSchedule
from errata.compress.workflow import apply

__all__ = [
    "BlockReport",
    "CacheQuant",
    "CacheSchedule",
    "CompressedPipeline",
    "DeepCache",
    "LearnedRounding",
    "Quantization",
    "Recipe",
    "apply",
    "load",
]
