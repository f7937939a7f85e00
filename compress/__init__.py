"""Compress: a float diffusers pipeline becomes a simulated low-bit, cached one.

`apply` needs the pipeline, its trajectories (`errata.calibration`) and a `Recipe`.
"""

from errata.compress.compressed import CompressedPipeline, load
from errata.compress.recipes.caching import CacheQuant, DeepCache
from errata.compress.recipes.quantization import LearnedRounding, Quantization
from errata.compress.recipes.recipe import Recipe
from errata.compress.recipes.schedule import CacheSchedule
from errata.compress.work.progress import BlockReport
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
