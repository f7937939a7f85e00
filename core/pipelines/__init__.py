"""Pipelines that diffusers lacks, in its own folder layout.

`save_pretrained` and `from_pretrained` work as for any diffusers pipeline; `errata.calibration.load_pipeline`
opens a folder of them too.
"""

from errata.pipelines.class_conditional import ClassConditionalLDMPipeline
from errata.pipelines.class_embedder import ClassEmbedder
from errata.pipelines.registry import MODELS, PIPELINES

__all__ = ["MODELS", "PIPELINES", "ClassConditionalLDMPipeline", "ClassEmbedder"]
