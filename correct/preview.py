"""A look at where a scheduler's step would lead, without a trace.

This file knows how diffusers' schedulers hold their state; `step_rule` knows their rules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from errata.correct.corrector import Correction
from errata.correct.device_sync import on_host
from errata.correct.step_rule import may_draw_noise


class SchedulerStep:
    """One pending call of `step`, a scheduler's own, with the arguments that the pipeline gave.

    `preview` may be called any number of times before `take`. Each call sees the state, the history and the
    random numbers that `take` will see, and changes none of them.

    Attributes:
        model_output: the prediction that the pipeline passed.
        sample: x_t, likewise.
    """

    def __init__(
        self,
        scheduler: Any,
        step: Callable[..., Any],
        bound: inspect.BoundArguments,
        *,
        timestep: float | None = None,
        timesteps: Tensor | None = None,
    ) -> None:
        """Take the step's `timestep` and all `timesteps` from main memory, where they are known."""
        bound.arguments["timestep"] = on_host(bound.arguments["timestep"], timestep)
        self._scheduler = scheduler
        self._step = step
        self._bound = bound
        self._timesteps = timesteps
        self._before = snapshot(scheduler, timesteps=timesteps)
        self._draws_noise = may_draw_noise(scheduler, self._bound.arguments)
        self.model_output: Tensor = self._bound.arguments["model_output"]
        self.sample: Tensor = self._bound.arguments["sample"]

    def scaled(self, sample: Tensor) -> Tensor:
        """Return `sample` `(B, …)`, scaled for the network's input, as the pipeline does at this step."""
        scaled: Tensor = self._before.scale_model_input(sample, self._bound.arguments["timestep"])
        return scaled

    def preview(self, prediction: Tensor) -> Tensor:
        """Return the sample that the step would return for `prediction`."""
        ahead = snapshot(self._scheduler, timesteps=self._timesteps)
        if not self._draws_noise:
            return prev_sample_of(self._call(ahead.step, model_output=prediction))
        generator = self._bound.arguments.get("generator")
        if generator is None and "generator" in self._bound.signature.parameters:
            generator = _default_generator(prediction.device)
        if generator is not None:
            return prev_sample_of(
                self._call(ahead.step, model_output=prediction, generator=_clones(generator))
            )
        with _forked_rng(prediction.device):
            return prev_sample_of(self._call(ahead.step, model_output=prediction))

    def take(self, prediction: Tensor) -> Any:
        """Step for real, with `prediction` in place of the pipeline's; return the scheduler's output."""
        return self._call(self._step, model_output=prediction)

    def take_corrected(self, corrections: Sequence[Correction]) -> Any:
        """Step for real, with what `corrections` in their order change; return the scheduler's output."""
        output = self.take(corrections[-1].prediction if corrections else self.model_output)
        replacing = [each.prev_sample for each in corrections if each.prev_sample is not None]
        if replacing:
            output = replaced(output, replacing[-1])
        for correction in corrections:
            if correction.shift is not None:
                output = shifted(output, correction.shift)
        return output

    def _call(self, step: Callable[..., Any], **changes: Any) -> Any:
        bound = inspect.BoundArguments(self._bound.signature, {**self._bound.arguments, **changes})
        return step(*bound.args, **bound.kwargs)


def snapshot(scheduler: Any, *, timesteps: Tensor | None = None) -> Any:
    """Return a scheduler in the same state that can be stepped without touching `scheduler`.

    It shares tables (tensors of one dimension, arrays, the config), which steps only read. It copies
    containers, whose elements steps replace, and batches, which PNDM adds to in place. `timesteps` replaces
    its own table with the same values in main memory.
    """
    clone = copy.copy(scheduler)
    state = vars(clone)
    state.pop("step", None)  # a hook on the original; the class's own step is wanted
    for name, value in list(state.items()):
        if type(value) in (list, dict):
            state[name] = copy.copy(value)
        elif isinstance(value, Tensor) and value.ndim > 1:
            state[name] = value.clone()
        elif isinstance(value, SchedulerMixin):  # UniPC's `solver_p`
            state[name] = snapshot(value)
    if timesteps is not None:
        state["timesteps"] = timesteps
    return clone


def replaced(output: Any, prev_sample: Tensor) -> Any:
    """Return the scheduler's `output` with another sample, in the type that the step returns."""
    prev_sample = prev_sample.to(prev_sample_of(output).dtype)
    if isinstance(output, tuple):
        return (prev_sample, *output[1:])
    output.prev_sample = prev_sample
    return output


def shifted(output: Any, shift: Tensor) -> Any:
    """Return the scheduler's `output` with `shift` added to its sample."""
    sample = prev_sample_of(output)
    return replaced(output, sample.to(torch.promote_types(sample.dtype, shift.dtype)) + shift)


def prev_sample_of(output: Any) -> Tensor:
    """Return the sample in what a scheduler's step returned."""
    sample: Tensor = output[0] if isinstance(output, tuple) else output.prev_sample
    return sample


def _clones(generator: Generator | list[Generator]) -> Generator | list[Generator]:
    """Return a clone of each generator; one that is in the list twice stays one generator."""
    if not isinstance(generator, list):
        return generator.clone_state()
    clones = {id(each): each.clone_state() for each in generator}
    return [clones[id(each)] for each in generator]


def _default_generator(device: torch.device) -> Generator | None:
    """Return the generator that a device draws from by default; None if it is not known.

    Clone it and do not rewind it: other threads draw from it too.
    """
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
    return None


def _forked_rng(device: torch.device) -> AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    if device.type == "cuda":
        return torch.random.fork_rng(devices=[device])
    return nullcontext()
