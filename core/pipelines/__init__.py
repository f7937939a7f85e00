"""Pipelines that diffusers lacks, in its own folder layout.

`save_pretrained` and `from_pretrained` work as for any diffusers pipeline; `errata.calibration.load_pipeline`
opens a folder of them too. A folder or an artifact names its classes; `PIPELINES` and `MODELS` are the only
names of errata's own that are looked up, and no name is ever resolved by an import path.
"""

from collections.abc import Mapping
from types import MappingProxyType

from diffusers import DiffusionPipeline, ModelMixin

from errata.pipelines.class_conditional import ClassConditionalLDMPipeline
from errata.pipelines.class_embedder import ClassEmbedder

__all__ = ["MODELS", "PIPELINES", "ClassConditionalLDMPipeline", "ClassEmbedder"]

PIPELINES: Mapping[str, type[DiffusionPipeline]] = MappingProxyType(
    {"ClassConditionalLDMPipeline": ClassConditionalLDMPipeline}
)
MODELS: Mapping[str, type[ModelMixin]] = MappingProxyType({"ClassEmbedder": ClassEmbedder})
