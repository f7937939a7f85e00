"""A diffusers pipeline around a stepwise denoiser: what compressed and deployed pipelines share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from errata.compress.network.denoiser import Denoiser
from errata.compress.network.run import Run
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

    def __call__(self, **kwargs: Any) -> Any:
        """Sample; keyword arguments are those of the diffusers pipeline.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded.
        """
        return self.start().pipe(**self.arguments(kwargs))

    def start(self) -> Run:
        """A fresh run; call `run.pipe(**pipeline.arguments(kwargs))` to sample with it, once."""
        return Run(self.pipe)

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`kwargs` with the recorded number of steps filled in and checked."""
        asked = kwargs.get("num_inference_steps", self.num_inference_steps)
        if asked != self.num_inference_steps:
            raise ArtifactMismatch(
                f"num_inference_steps={asked}, but {self.num_inference_steps} were recorded, and the "
                f"activation scales belong to them; leave it out, or calibrate again "
                f"with num_inference_steps={asked}"
            )
        return {**kwargs, "num_inference_steps": self.num_inference_steps}
