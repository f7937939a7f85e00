"""The sampling step that every quantizer of one model reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from errata.runtime.schedule import StepKind


class StepContext:
    """Index and kind of the denoiser call under way; shared by all layers of one model.

    Activation scales are one per sampling step, so a layer must know the step. It is set by the denoiser for
    the duration of one evaluation and read by the layers; reading it outside an evaluation is an error, so a
    layer can never run with the scale of some earlier step. Evaluations in several threads take turns.

    Whoever records a call hears of it where the step is read as a number (`on_read`).

    The step is also kept in a tensor on each device that asks for one. Programs that are made once and run at
    every step, compiled ones and CUDA graphs, read that one: a Python number would be a part of the program.
    """

    def __init__(self) -> None:
        self._step: int | Tensor | None = None
        self._kind: StepKind = "full"
        self._time: float | None = None
        self._device_steps: dict[torch.device, Tensor] = {}
        # Not derived from `_step` where it is read: what is compiled would then be compiled for that step.
        self._has_one_step = False
        self._turn = threading.RLock()
        self.on_read: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, which gets a lock of its own."""
        return {name: value for name, value in vars(self).items() if name != "_turn"} | {"on_read": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` gave."""
        vars(self).update(state)
        self._turn = threading.RLock()

    @property
    def step(self) -> int | Tensor:
        """The current step index; or `(B,)`, int64, one per row, where rows of several steps run together.

        Raises:
            RuntimeError: outside an evaluation.
        """
        if self.on_read is not None:
            self.on_read()
        return self.declared_step

    @property
    def declared_step(self) -> int | Tensor:
        """The same, for layers that tell a recorder by themselves what of theirs depends on the step.

        Raises:
            RuntimeError: outside an evaluation.
        """
        if self._step is None:
            raise RuntimeError("no sampling step is set: call the model through its denoiser")
        return self._step

    @property
    def shown(self) -> tuple[Tensor, ...]:
        """The tensors of `follow`, which change from step to step."""
        return tuple(self._device_steps.values())

    @property
    def kind(self) -> StepKind:
        """Whether the evaluation under way is full or reads the cache."""
        return self._kind

    @property
    def time(self) -> float | None:
        """The training time of the evaluation under way, where one serves all rows and was told."""
        return self._time

    def follow(self, device: torch.device) -> Tensor:
        """Return the tensor, `(1,)`, int64, that shows the current step on `device`: always the same one.

        It is written by the host without waiting for the device, when an evaluation begins. A layer calls
        this when it is made, so that no program contains the making of the tensor.
        """
        if device not in self._device_steps:
            with torch.inference_mode(False):  # else it could not be written to outside that mode
                self._device_steps[device] = torch.zeros(1, dtype=torch.int64, device=device)
                self._show(self._step)
        return self._device_steps[device]

    def step_on(self, device: torch.device) -> Tensor:
        """Return the tensor of `follow`, for the evaluation under way.

        Raises:
            RuntimeError: outside an evaluation, or in one whose rows belong to several steps.
        """
        if not self._has_one_step:
            raise RuntimeError(
                "no single sampling step is set: call the model through its denoiser, all rows at one step"
            )
        return self._device_steps[device] if device in self._device_steps else self.follow(device)

    def _show(self, step: int | Tensor | None) -> None:
        self._has_one_step = step is not None and not isinstance(step, Tensor)
        if step is not None and not isinstance(step, Tensor):
            for shown in self._device_steps.values():
                shown.fill_(step)

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
            self._show(step)
            try:
                yield
            finally:
                self._step, self._kind, self._time = None, "full", None
                self._show(None)
