"""A diffusers pipeline around a stepwise denoiser: what compressed and deployed pipelines share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from errata.compress.network.denoiser import Denoiser
from errata.compress.network.run import CallView, Evaluation, Run
from errata.compress.recipes.schedule import CacheSchedule
from errata.errors import ArtifactMismatch


class SteppedPipeline:
    """Behaves like the diffusers pipeline that it came from, at the recorded number of steps.

    Calling it starts a `Run`: denoiser calls are counted, and the cache schedule decides which are full.
    Calling `.pipe` itself makes full calls only.
    """

    def __init__(self, pipe: DiffusionPipeline, *, num_inference_steps: int) -> None:
        self.pipe = pipe
        self.num_inference_steps = num_inference_steps

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser of `pipe.unet`."""
        denoiser: Denoiser = self.pipe.unet.denoiser
        return denoiser

    @property
    def schedule(self) -> CacheSchedule:
        """Which steps are full, which are cached."""
        return self.denoiser.schedule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; arguments are those of the diffusers pipeline.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded.
        """
        return self.start().pipe(**self.arguments(kwargs, args))

    def start(
        self,
        *,
        denoiser: Denoiser | None = None,
        decide: Callable[[CallView], Evaluation] | None = None,
        remembers: int = 1,
    ) -> Run:
        """A fresh run, see `Run`; call `run.pipe(**pipeline.arguments(kwargs))` to sample with it, once."""
        return Run(self.pipe, denoiser=denoiser, decide=decide, remembers=remembers)

    def arguments(self, kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> dict[str, Any]:
        """The call's arguments by name, with the recorded number of steps filled in and checked.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded.
            TypeError: `args` are more than the pipeline takes, or repeat what `kwargs` name.
        """
        if args:
            bound = inspect.signature(type(self.pipe).__call__).bind_partial(self.pipe, *args, **kwargs)
            kwargs = dict(list(bound.arguments.items())[1:])
        asked = kwargs.get("num_inference_steps", self.num_inference_steps)
        if asked != self.num_inference_steps:
            raise ArtifactMismatch(
                f"num_inference_steps={asked}, but {self.num_inference_steps} were recorded, and the "
                f"activation scales belong to them; leave it out, or calibrate again "
                f"with num_inference_steps={asked}"
            )
        return {**kwargs, "num_inference_steps": self.num_inference_steps}
