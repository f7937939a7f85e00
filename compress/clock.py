"""The sampling step that every quantizer of one model reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Index of the denoiser call under way; shared by all layers of one model.

    Activation scales are one per sampling step, so a layer must know the step. It is set by the denoiser for
    the duration of one evaluation and read by the layers; reading it outside an evaluation is an error, so a
    layer can never run with the scale of some earlier step.
    """

    def __init__(self) -> None:
        self._step: int | None = None

    @property
    def step(self) -> int:
        """The current step index.

        Raises:
            RuntimeError: outside an evaluation.
        """
        if self._step is None:
            raise RuntimeError("no sampling step is set: call the model through its denoiser")
        return self._step

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Set the step for the body; evaluations do not nest."""
        if self._step is not None:
            raise RuntimeError(
                f"step {self._step} is still being evaluated; one model serves one run at a time"
            )
        self._step = step
        try:
            yield
        finally:
            self._step = None
