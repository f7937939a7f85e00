"""The sampling step that every quantizer of one model reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from errata.compress.recipes.schedule import StepKind


class StepClock:
    """Index and kind of the denoiser call under way; shared by all layers of one model.

    Activation scales are one per sampling step, so a layer must know the step. It is set by the denoiser for
    the duration of one evaluation and read by the layers; reading it outside an evaluation is an error, so a
    layer can never run with the scale of some earlier step. Evaluations in several threads take turns.
    """

    def __init__(self) -> None:
        self._step: int | Tensor | None = None
        self._kind: StepKind = "full"
        self._time: float | None = None
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy, which gets a lock of its own."""
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of `__getstate__`."""
        vars(self).update(state)
        self._turn = threading.RLock()

    @property
    def step(self) -> int | Tensor:
        """The current step index; or `(B,)`, int64, one per row, where rows of several steps run together.

        Raises:
            RuntimeError: outside an evaluation.
        """
        if self._step is None:
            raise RuntimeError("no sampling step is set: call the model through its denoiser")
        return self._step

    @property
    def kind(self) -> StepKind:
        """Whether the evaluation under way is full or reads the cache."""
        return self._kind

    @property
    def time(self) -> float | None:
        """The training time of the evaluation under way, where one serves all rows and was told."""
        return self._time

    @contextmanager
    def at(self, step: int | Tensor, kind: StepKind = "full", *, time: float | None = None) -> Iterator[None]:
        """Set the step for the body, when the evaluations of other threads are over.

        Raises:
            RuntimeError: this thread is inside an evaluation already; they do not nest.
        """
        with self._turn:
            if self._step is not None:
                raise RuntimeError(f"step {self._step} is still being evaluated; evaluations do not nest")
            self._step, self._kind, self._time = step, kind, time
            try:
                yield
            finally:
                self._step, self._kind, self._time = None, "full", None


def at_step(values: Tensor, step: int | Tensor, x: Tensor) -> Tensor:
    """The entry of a per-step table `(T,)` for `x`: a scalar, or one value per row, shaped to `x`.

    Rows may have been split further (the heads of an attention): every row of the batch then stands for
    several neighbouring rows of `x`.
    """
    if isinstance(step, int):
        return values[step]
    rows = values[step].repeat_interleave(x.shape[0] // step.shape[0])
    return rows.reshape(-1, *([1] * (x.ndim - 1)))
