"""The manifest of an engine directory, `errata-engine.json`: its artifact, its graphs, its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.canonical_json import dumps
from errata.deploy.manifest import (
    DIGEST_KEY,
    FORMATS,
    FileRecord,
    Manifest,
    file_records,
    parse_manifest,
    plain_texts,
    read_sealed,
)
from errata.deploy.sharding import is_denoiser_file
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError

ENGINE_FORMAT = "errata-engine/1"
ENGINE_FILE = "errata-engine.json"
GRAPH_SUFFIX = ".onnx"
# How a graph has the scales of a step: gathered from tables, or around quantize/dequantize pairs of scale 1.
FORMS = ("gathered", "qdq")
_KEYS = {"format", "made_by", "artifact", "form", "graphs", "files"}
_TENSOR_KEYS = {"name", "dtype", "shape"}
_GRAPH_KEYS = {"inputs", "outputs"}
DTYPES = ("bool", "float32", "int32", "int64")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a graph; a size of None is the number of samples."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        sizes = all(size is None or (type(size) is int and size > 0) for size in self.shape)
        if type(self.name) is not str or self.dtype not in DTYPES or not sizes or None in self.shape[1:]:
            raise ValueError(
                f"{str(self.name)[:80]!r} is {str(self.dtype)[:80]} {str(self.shape)[:80]}; allowed are "
                f"{', '.join(DTYPES)}, and sizes above zero after the first"
            )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """What a graph takes and gives, in its order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, value: Any) -> GraphSpec:
        """Read back what `to_json` wrote.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(value, dict) or set(value) != _GRAPH_KEYS:
            raise ValueError(f"a graph does not have exactly the keys {sorted(_GRAPH_KEYS)}")
        return cls(inputs=_specs(value["inputs"]), outputs=_specs(value["outputs"]))


@dataclass(frozen=True, kw_only=True)
class EngineManifest(Manifest):
    """Typed view of `errata-engine.json`.

    What the manifest of an artifact says (recipe, schedule, sampler, …) is said of the engine, too; `made_by`
    and `files` are its own, and so is `sha256`.

    Attributes:
        artifact: manifest of the artifact that the engine was made from.
        form: how they have the scales of a step, one of `FORMS`.
        graphs: what each ONNX file takes and gives.
    """

    artifact: Manifest
    form: str
    graphs: Mapping[str, GraphSpec]

    @classmethod
    def of(
        cls,
        artifact: Manifest,
        *,
        form: str,
        made_by: Mapping[str, str],
        graphs: Mapping[str, GraphSpec],
        files: Mapping[str, FileRecord],
    ) -> EngineManifest:
        """Return the manifest of an engine of that artifact."""
        said = {**vars(artifact), "made_by": made_by, "files": files}
        return cls(**said, artifact=artifact, form=form, graphs=graphs)

    @property
    def denoiser_bytes(self) -> int:
        """Size of the graphs."""
        return sum(record.bytes for path, record in self.files.items() if path.endswith(GRAPH_SUFFIX))

    @property
    def artifact_sha256(self) -> str:
        """The identity of the artifact that the engine was made from, and computes the same as."""
        return self.artifact.sha256

    @property
    def shared_files(self) -> dict[str, FileRecord]:
        """The files that an engine has from its artifact: all but the denoiser's tensors."""
        files = self.artifact.files.items()
        return {path: record for path, record in files if not is_denoiser_file(path)}

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value, without the manifest's own digest."""
        return {
            "format": ENGINE_FORMAT,
            "made_by": dict(self.made_by),
            "artifact": {**self.artifact.to_json(), DIGEST_KEY: self.artifact.sha256},
            "form": self.form,
            "graphs": {name: spec.to_json() for name, spec in self.graphs.items()},
            "files": {path: vars(record) for path, record in self.files.items()},
        }

    def write(self, root: Path) -> None:
        """Write `errata-engine.json`, canonical, with its own digest."""
        (root / ENGINE_FILE).write_bytes(dumps({**self.to_json(), DIGEST_KEY: self.sha256}))


def read_engine_manifest(root: Path) -> EngineManifest:
    """Read `errata-engine.json`; refuse any byte that the writer would not have written.

    Raises:
        ArtifactError: there is no engine at `root`.
        ArtifactVersionError: another format version, of the engine or of its artifact.
        ArtifactCorruptError: not canonical, altered, or not a manifest.
    """
    file = root / ENGINE_FILE
    if not file.exists() and not file.is_symlink():
        raise ArtifactError(
            f"{root} is not an engine: it has no {ENGINE_FILE}; make one with `errata export-onnx ARTIFACT`"
        )
    value = read_sealed(root, ENGINE_FILE, (ENGINE_FORMAT,))
    if odd := sorted(set(value) ^ _KEYS):
        trouble = "does not have" if odd[0] in _KEYS else "has"
        raise ArtifactCorruptError(f"{file} {trouble} the key {odd[0][:80]!r}; it was not written by errata")
    artifact = _artifact(value["artifact"], file)
    if value["form"] not in FORMS:
        raise ArtifactVersionError(
            f"{file} has the form {str(value['form'])[:80]!r}; this version reads {' and '.join(FORMS)}"
        )
    try:
        manifest = EngineManifest.of(
            artifact,
            form=value["form"],
            made_by=plain_texts("made_by", _object("made_by", value["made_by"])),
            graphs={
                name: GraphSpec.from_json(spec) for name, spec in _object("graphs", value["graphs"]).items()
            },
            files=file_records(_object("files", value["files"])),
        )
        for key, written in manifest.to_json().items():
            if key != "artifact" and dumps(written) != dumps(value[key]):
                raise ValueError(f"its {key} would be written as {str(written)[:200]}")
    except (TypeError, ValueError) as error:
        raise ArtifactCorruptError(
            f"{file} is not a readable manifest: {str(error)[:500]}; it was not written by errata"
        ) from error
    return manifest


def _artifact(value: Any, file: Path) -> Manifest:
    if not isinstance(value, dict) or value.get("format") not in FORMATS:
        found = str(value.get("format") if isinstance(value, dict) else value)[:80]
        raise ArtifactVersionError(
            f"{file} is of an artifact of format {found!r}; this version reads "
            f"{' and '.join(map(repr, FORMATS))}"
        )
    content = dict(value)
    stated = content.pop(DIGEST_KEY, None)
    artifact = parse_manifest(content, file)
    if stated != artifact.sha256:
        raise ArtifactCorruptError(
            f"{file} says that its artifact is {str(stated)[:80]}, but its content is {artifact.sha256}; it "
            "was not written by errata"
        )
    return artifact


def _specs(value: Any) -> tuple[TensorSpec, ...]:
    if not isinstance(value, list):
        raise ValueError(f"tensors of a graph are {str(value)[:80]}, not a list")
    for item in value:
        if not isinstance(item, dict) or set(item) != _TENSOR_KEYS or not isinstance(item["shape"], list):
            raise ValueError(f"a tensor of a graph does not have exactly the keys {sorted(_TENSOR_KEYS)}")
    return tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in value)


def _object(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{key} is a {type(value).__name__}, not an object")
    return value
