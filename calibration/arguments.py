"""`arguments.json`: the prompts and further pipeline arguments that a calibration set was recorded with.

Later stages sample the same pipeline, and need them. They are kept where JSON can hold them: texts and labels
can, images and tensors cannot. A set that needed none, or that an earlier release recorded, has no such file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    @classmethod
    def of(
        cls, prompts: Sequence[str] | None, inputs: Sequence[Mapping[str, Any] | None]
    ) -> PipelineArguments:
        """Return the arguments of a recording; `inputs` are all None, or none is."""
        given = tuple(mapping for mapping in inputs if mapping is not None)
        return cls(prompts=None if prompts is None else tuple(prompts), inputs=given or None)

    def write(self, root: Path) -> None:
        """Write `arguments.json`, unless there is nothing to write or JSON cannot hold it.

        Raises:
            CalibrationError: the file cannot be written.
        """
        if self.prompts is None and self.inputs is None:
            return
        value = {"prompts": self.prompts, "inputs": self.inputs}
        try:
            data = canonical_json.dumps(value)
            back = canonical_json.loads_strict(data)
            is_plain = value_digest(back, name="") == value_digest(value, name="")
        except (TypeError, ValueError):
            return
        if is_plain:
            write_whole(root / ARGUMENTS, data, error=CalibrationError, advice="choose another directory")

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
