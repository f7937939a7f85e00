"""Looks over a pipeline's shoulder: what goes into and comes out of every step of its scheduler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import CallView, Evaluation, Run


@dataclass(frozen=True, kw_only=True)
class SamplerStep:
    """One call of `scheduler.step`; the tensors are copies.

    Attributes:
        timestep: as the pipeline passed it.
        sample: x_t, `(B, …)`, as the pipeline holds it (not scaled for the network).
        prediction: what the scheduler was given (guided where the pipeline guides).
        result: x_{t-1}, what the pipeline goes on with.
    """

    timestep: float
    sample: Tensor
    prediction: Tensor
    result: Tensor


OnStep = Callable[[SamplerStep], None]


@contextmanager
def watched(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Tells `on_step` of every step of `scheduler` inside the body; the scheduler must be a private one.

    What was put in the place of `scheduler.step` before (a correction) is inside of what is watched.
    """
    before = vars(scheduler).get("step")
    step = scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines inspect its signature
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        sample, prediction = given["sample"].clone(), given["model_output"].clone()
        output = step(*args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output.prev_sample
        on_step(
            SamplerStep(
                timestep=float(given["timestep"]),
                sample=sample,
                prediction=prediction,
                result=result.clone(),
            )
        )
        return output

    scheduler.step = watched_step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


class WatchedArtifact(DeployedPipeline):
    """The same artifact; every run on it, a corrected one too, tells `on_step` of its steps."""

    def __init__(self, deployed: DeployedPipeline, on_step: OnStep) -> None:
        super().__init__(
            deployed.pipe,
            num_inference_steps=deployed.num_inference_steps,
            manifest=deployed.manifest,
            report=deployed.backend_report(),
        )
        self._on_step = on_step

    def start(
        self,
        *,
        denoiser: Denoiser | None = None,
        decide: Callable[[CallView], Evaluation] | None = None,
        remembers: int = 1,
    ) -> Run:
        """See `SteppedPipeline.start`."""
        run = super().start(denoiser=denoiser, decide=decide, remembers=remembers)
        watch_calls(run.pipe, self._on_step)
        return run


def watch_calls(pipe: DiffusionPipeline, on_step: OnStep) -> None:
    """Makes the calls of a private `pipe` tell `on_step`; changes `pipe`, and nothing that it is made of.

    The scheduler is watched from the moment of the call, hence outside of a correction that was installed
    before it. Python looks up `__call__` on the class, so the object gets a class of its own.
    """
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watched(self.scheduler, on_step):
            return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    pipe.set_progress_bar_config(disable=True)


def arguments_for(pipe: DiffusionPipeline, indices: range, *, seed: int, inputs: Inputs) -> Mapping[str, Any]:
    """Keyword arguments of a call that samples these indices; sample i depends on `seed + i` alone."""
    arguments: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(seed + index) for index in indices],
        **inputs(indices),
    }
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments.setdefault("output_type", "np")  # nobody looks at the images; PIL is slower
    return arguments
