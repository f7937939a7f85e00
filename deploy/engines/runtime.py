"""The optional packages that engines need."""

from __future__ import annotations

import importlib
from types import ModuleType

from errata.errors import ArtifactError


def needed(package: str) -> ModuleType:
    """The package `onnx` or `onnxruntime`.

    Raises:
        ArtifactError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArtifactError(
            f"ONNX engines need {package} ({error}); `pip install 'errata[export]'`"
        ) from error
