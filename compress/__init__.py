"""Compress: a float diffusers pipeline becomes a simulated low-bit, cached one.

`compress` needs the pipeline, its trajectories (`errata.calibration`) and a `Recipe`. `estimate` says what it
will take.
"""

from errata.compress.compressed import CompressedPipeline, load
from errata.compress.jobs.estimation import estimate
from errata.compress.jobs.progress import BlockReport
from errata.compress.workflow import apply, compress
from errata.runtime.recipes.caching import CacheQuant, DeepCache
from errata.runtime.recipes.quantization import LearnedRounding, Quantization
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.schedule import CacheSchedule

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
    "compress",
    "estimate",
    "load",
]
