"""`arguments.json`: the prompts and further pipeline arguments that a calibration set was recorded with.

Later stages sample the same pipeline, and need them. They are kept where JSON can hold them: texts and labels
can, images and tensors cannot. A set that needed none, or that an earlier release recorded, has no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata import canonical_json
from errata.directories import write_whole
from errata.errors import CalibrationError
from errata.fingerprint import value_digest

ARGUMENTS = "arguments.json"


@dataclass(frozen=True, kw_only=True)
class PipelineArguments:
    """What the pipeline was called with, beside noise, steps and guidance.

    Attributes:
        prompts: one text per sample, or None.
        inputs: one mapping per sample-batch, or None.
    """

    prompts: tuple[str, ...] | None = None
    inputs: tuple[Mapping[str, Any], ...] | None = None

    def write(self, root: Path) -> None:
        """Write `arguments.json`, unless there is nothing to write.

        Raises:
            CalibrationError: the file cannot be written.
        """
        if data := self._data():
            write_whole(root / ARGUMENTS, data, error=CalibrationError, advice="choose another directory")

    @property
    def num_bytes(self) -> int:
        """Size of what `write` writes."""
        return len(self._data())

    def _data(self) -> bytes:
        """Return the file's content; nothing where there is nothing to write."""
        if self == PipelineArguments():
            return b""
        return canonical_json.dumps({"prompts": self.prompts, "inputs": self.inputs})

    @classmethod
    def read(cls, root: Path) -> PipelineArguments | None:
        """Return what `write` wrote; None if it wrote nothing.

        Raises:
            CalibrationError: the file cannot be read.
        """
        file = root / ARGUMENTS
        if not file.exists():
            return None
        try:
            value = canonical_json.loads_strict(file.read_bytes())
            prompts, inputs = value["prompts"], value["inputs"]
            return cls(
                prompts=None if prompts is None else tuple(prompts),
                inputs=None if inputs is None else tuple(map(dict, inputs)),
            )
        except (OSError, KeyError, TypeError, ValueError) as problem:
            raise CalibrationError(f"`{file}` is damaged: {problem}; calibrate again") from problem


class PlainInputs:
    """Collects what each sample-batch was given, as long as JSON can hold it; images are let go at once."""

    def __init__(self) -> None:
        self._mappings: list[Mapping[str, Any]] = []
        self._is_plain = True

    def add(self, mapping: Mapping[str, Any] | None) -> None:
        """Add the next sample-batch's mapping; None where none was given."""
        plain = as_plain(mapping)
        self._is_plain = self._is_plain and plain is not None
        if self._is_plain and plain is not None:
            self._mappings.append(plain)
        else:
            self._mappings.clear()

    def all(self) -> tuple[Mapping[str, Any], ...] | None:
        """Return all mappings, or None if there was one that JSON cannot hold."""
        return tuple(self._mappings) or None


def as_plain(mapping: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what JSON makes of a mapping; None if that is not the same, or there is no mapping."""
    if mapping is None:
        return None
    try:
        plain: dict[str, Any] = canonical_json.loads_strict(canonical_json.dumps(dict(mapping)))
    except (TypeError, ValueError):
        return None
    is_same = value_digest(plain, name="inputs") == value_digest(mapping, name="inputs")
    return plain if is_same else None
