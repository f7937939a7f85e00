"""What a pipeline gives its denoiser: the inputs that a graph is traced with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.deploy.pipeline import DeployedPipeline
from errata.errors import ArtifactError, first_line
from errata.runtime.denoiser import Conditioning
from errata.runtime.schedule import CacheSchedule, StepKind

# More than one tells what is there once from what is there for each sample; four have a median.
_SAMPLES = 4


class _SeenError(Exception):
    """Ends the run at its first call."""


class _Spy:
    """A `Denoiser` that keeps what it is given and evaluates nothing."""

    def __init__(self, schedule: CacheSchedule, timesteps: tuple[float, ...]) -> None:
        self.schedule = schedule
        self.timesteps = timesteps
        self.given: tuple[Tensor, Conditioning] | None = None

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        self.given = (x, cond)
        raise _SeenError

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        raise _SeenError

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        raise _SeenError


def example_inputs(
    deployed: DeployedPipeline, example: Mapping[str, Any] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample and conditions of the first denoiser call of a run, floating ones as float32.

    Args:
        deployed: the artifact.
        example: arguments of a call of the pipeline; None finds some that draw four samples.

    Raises:
        ArtifactError: the pipeline refuses them, or needs some that cannot be guessed.
    """
    spy = _Spy(deployed.schedule, deployed.denoiser.timesteps)
    arguments = _guessed(deployed.pipe) if example is None else dict(example)
    arguments.setdefault("generator", torch.Generator().manual_seed(0))
    deployed.pipe.set_progress_bar_config(disable=True)
    run = deployed.start(denoiser=spy)
    try:
        run.pipe(**deployed.arguments(arguments))
    except _SeenError:
        pass
    except Exception as error:  # diffusers raises whatever it likes
        first = first_line(error)
        raise ArtifactError(
            f"{type(deployed.pipe).__name__} refuses the call {sorted(arguments)} from which the inputs of "
            f"the graphs are taken: {first}; give another one as `example`"
        ) from error
    assert spy.given is not None  # every pipeline calls its denoiser, or raises
    sample, cond = spy.given
    return sample.float(), {name: _single(value) for name, value in cond.items()}


def _guessed(pipe: Any) -> dict[str, Any]:
    takes = inspect.signature(type(pipe).__call__).parameters
    if "image" in takes:
        raise ArtifactError(
            f"{type(pipe).__name__} needs a picture: give a call of it as `example`, in Python, with a "
            "picture of the size that it will be used for"
        )
    arguments: dict[str, Any] = {}
    if "prompt" in takes:
        arguments["prompt"] = ["a photo"] * _SAMPLES
    if getattr(pipe, "num_labels", 0):
        arguments["class_labels"] = [0] * _SAMPLES
    elif "batch_size" in takes:
        arguments["batch_size"] = _SAMPLES
    return arguments


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
