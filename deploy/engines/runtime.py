"""The runtime of engines: the optional packages onnx and onnxruntime, and a session of one graph."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from errata.deploy.cpu import int8
from errata.deploy.engines.manifest import GraphSpec, TensorSpec
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactMismatchError

_ERRORS_ONLY = 3


def needed(package: str) -> ModuleType:
    """Return the package `onnx` or `onnxruntime`.

    Raises:
        ArtifactError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArtifactError(
            f"ONNX engines need {package} ({error}); `pip install 'errata[export]'`"
        ) from error


class Session:
    """One ONNX graph, run by onnxruntime on the CPU; calls from several threads run beside each other.

    It takes as many threads as torch has when it is made. Copies share it: it holds weights, and no state.

    Raises:
        ArtifactCorruptError: onnxruntime cannot make a session of the file.
        ArtifactError: onnxruntime is not installed.
    """

    def __init__(self, file: Path, spec: GraphSpec) -> None:
        self.spec = spec
        onnxruntime = needed("onnxruntime")
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), self._options(onnxruntime), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no class of its own for them all
            raise ArtifactCorruptError(
                f"{file} cannot be run by onnxruntime {onnxruntime.__version__}: {str(error)[:300]}; export "
                "it again, or install the version that its manifest names"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Return itself."""
        return self

    @staticmethod
    def _options(onnxruntime: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS_ONLY
        if not int8.has_onednn():
            # uint8 by int8 sums pairs in int16 there, and saturates; uint8 by uint8 does not.
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options

    def __call__(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs, float32, for all inputs by name; those that float are cast to float32.

        Raises:
            ArtifactMismatchError: inputs are missing, unknown, or of other sizes than the graph takes.
        """
        expected = {spec.name: spec for spec in self.spec.inputs}
        if odd := sorted(set(expected) ^ set(tensors)):
            trouble = "needs" if odd[0] in expected else "does not take"
            raise ArtifactMismatchError(
                f"this engine {trouble} the input {odd[0]!r}; it was exported for {', '.join(expected)}: "
                "call the pipeline as it was called for the export, or export again with such a call as "
                "`example`"
            )
        rows = len(tensors[self.spec.inputs[0].name])
        arrays = {name: _array(tensors[name], spec, rows) for name, spec in expected.items()}
        return [torch.from_numpy(output) for output in self._session.run(None, arrays)]


def _array(value: Tensor, spec: TensorSpec, rows: int) -> Any:
    expected = tuple(rows if size is None else size for size in spec.shape)
    if tuple(value.shape) != expected:
        raise ArtifactMismatchError(
            f"this engine takes {spec.name!r} as {list(spec.shape)}, None being the number of samples "
            f"({rows} here), got {list(value.shape)}; keep to the sizes that it was exported for, or export "
            "again"
        )
    return value.detach().to("cpu", getattr(torch, spec.dtype)).contiguous().numpy()
