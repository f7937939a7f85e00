"""What a folder or an artifact may name by class name; no name is ever resolved by import path."""

from collections.abc import Mapping
from types import MappingProxyType

from diffusers import DiffusionPipeline, ModelMixin

from errata.pipelines.class_conditional import ClassConditionalLDMPipeline
from errata.pipelines.class_embedder import ClassEmbedder

__all__ = ["MODELS", "PIPELINES"]

PIPELINES: Mapping[str, type[DiffusionPipeline]] = MappingProxyType(
    {"ClassConditionalLDMPipeline": ClassConditionalLDMPipeline}
)
MODELS: Mapping[str, type[ModelMixin]] = MappingProxyType({"ClassEmbedder": ClassEmbedder})
