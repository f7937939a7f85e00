"""Pipelines that diffusers lacks, in its own folder layout.

`save_pretrained` and `from_pretrained` work as for any diffusers pipeline; `errata.calibration.load_pipeline`
opens a folder of them too. A folder or an artifact names its classes; a name is looked up in diffusers, in
`PIPELINES` and in `MODELS`, and never resolved by an import path. `register` adds a class of yours.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from errata.pipelines.class_conditional import ClassConditionalLDMPipeline
from errata.pipelines.class_embedder import ClassEmbedder

__all__ = ["MODELS", "PIPELINES", "ClassConditionalLDMPipeline", "ClassEmbedder", "register"]

_Kind = TypeVar("_Kind", bound=type[Any])
_pipelines: dict[str, type[DiffusionPipeline]] = {"ClassConditionalLDMPipeline": ClassConditionalLDMPipeline}

PIPELINES: Mapping[str, type[DiffusionPipeline]] = MappingProxyType(_pipelines)
"""Pipeline classes beside those of diffusers, by name."""

MODELS: Mapping[str, type[ModelMixin]] = MappingProxyType({"ClassEmbedder": ClassEmbedder})
"""Component classes beside those of diffusers and transformers, by name."""


def register(kind: _Kind) -> _Kind:
    """Let folders and artifacts name this pipeline class, in this process; return it, as a decorator does.

    Whoever opens such a folder or artifact has to register the class first.

    Raises:
        TypeError: not a subclass of `DiffusionPipeline`.
        ValueError: diffusers or errata has another class of that name.
    """
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise TypeError(f"{kind!r} is not a pipeline class; register a subclass of DiffusionPipeline")
    name = kind.__name__
    known = _pipelines.get(name) or getattr(diffusers, name, None)
    # A class that was defined again, as in a notebook, takes the place of its older self.
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{name} is already the name of {known.__module__}.{name}; choose another name")
    _pipelines[name] = kind
    return kind
