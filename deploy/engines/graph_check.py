"""Checks of an ONNX file before a runtime reads it: it fits its manifest and refers to nothing outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from errata.deploy.engines.manifest import GraphSpec, TensorSpec
from errata.deploy.engines.runtime import needed
from errata.errors import ArtifactCorruptError

# What protobuf can hold in one message.
LARGEST_GRAPH = 2**31 - 1
MOST_NODES = 200_000
_DOMAINS = ("", "com.microsoft")
# onnxruntime's own domain has nodes that open files (EPContext) or run other models' code; this one does not.
_MICROSOFT = ("MatMulIntegerToFloat",)
_NEWEST_IR = 10


def check_graph(file: Path, spec: GraphSpec) -> None:
    """Parse the file without following references, and compare it with the specification.

    Raises:
        ArtifactCorruptError: it is too large, or not ONNX; it refers to data outside, has nodes of other
            domains than ONNX's and onnxruntime's or with graphs inside, functions, or other inputs or
            outputs.
        ArtifactError: onnx is not installed.
    """
    if (size := file.stat().st_size) > LARGEST_GRAPH:
        raise ArtifactCorruptError(f"{file} has {size:,} bytes; a graph has at most {LARGEST_GRAPH:,}")
    onnx = needed("onnx")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf raises errors of any class
        raise ArtifactCorruptError(
            f"{file} is not an ONNX file: {str(error)[:200]}; export it again"
        ) from error
    for reason in _reasons_to_refuse(model):
        raise ArtifactCorruptError(f"{file} {reason}; it was not written by errata")
    _check_ends(file, "inputs", model.graph.input, spec.inputs)
    _check_ends(file, "outputs", model.graph.output, spec.outputs)


def graph_spec(file: Path) -> GraphSpec:
    """Return the specification of a graph that was just written."""
    graph = needed("onnx").load(str(file), load_external_data=False).graph
    inputs, outputs = (tuple(_spec(end) for end in ends) for ends in (graph.input, graph.output))
    return GraphSpec(inputs=inputs, outputs=outputs)


def _reasons_to_refuse(model: Any) -> Iterator[str]:
    if not 0 < model.ir_version <= _NEWEST_IR:
        yield f"has the IR version {model.ir_version}; allowed are 1 to {_NEWEST_IR}"
    for used in model.opset_import:
        if used.domain not in _DOMAINS:
            yield f"imports operators of {used.domain[:80]!r}; allowed are ONNX's own and com.microsoft"
    if model.functions or model.training_info:
        yield "defines functions or training of its own"
    graph = model.graph
    if len(graph.node) > MOST_NODES:
        yield f"has {len(graph.node):,} nodes; allowed are {MOST_NODES:,}"
    if graph.sparse_initializer:
        yield "has sparse initializers"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in _DOMAINS or (node.domain and node.op_type not in _MICROSOFT):
            yield (
                f"has a node {node.op_type[:80]!r} of {node.domain[:80]!r}; allowed are ONNX's own and "
                f"{', '.join(_MICROSOFT)}"
            )
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"has a node {node.op_type[:80]!r} with a graph inside"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                yield f"has a node {node.op_type[:80]!r} with a sparse tensor"
            tensors += [attribute.t] if attribute.HasField("t") else []
            tensors += attribute.tensors
    for tensor in tensors:
        if tensor.external_data or tensor.data_location:
            yield f"keeps the tensor {tensor.name[:80]!r} in another file"


def _check_ends(file: Path, which: str, found: Iterable[Any], expected: tuple[TensorSpec, ...]) -> None:
    try:
        ends = tuple(_spec(end) for end in found)
    except (KeyError, ValueError) as error:
        raise ArtifactCorruptError(
            f"{file} has unusable {which}: {str(error)[:200]}; export it again"
        ) from error
    if ends != expected:
        raise ArtifactCorruptError(
            f"{file} has the {which} {_told(ends)}, the manifest says {_told(expected)}; it was not written "
            "by errata"
        )


def _spec(end: Any) -> TensorSpec:
    kinds = needed("onnx").TensorProto
    dtypes = {kinds.BOOL: "bool", kinds.FLOAT: "float32", kinds.INT32: "int32", kinds.INT64: "int64"}
    kind = end.type.tensor_type
    if kind.elem_type not in dtypes:
        raise ValueError(f"{end.name[:80]!r} has the element type {kind.elem_type}")
    shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
    return TensorSpec(name=end.name, dtype=dtypes[kind.elem_type], shape=shape)


def _told(ends: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{end.name[:40]} {end.dtype} {list(end.shape)}" for end in ends)[:400]
