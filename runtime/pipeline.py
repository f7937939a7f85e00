"""A diffusers pipeline around a stepwise denoiser: what compressed and deployed pipelines share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from errata.errors import ArtifactMismatchError
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import CallView, Evaluation, Run
from errata.runtime.schedule import CacheSchedule, StepKind


class CacheInfo(NamedTuple):
    """Denoiser calls so far: `hits` read a cached feature, `misses` were full."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Share of calls that read a cached feature; 0 before the first call."""
        return self.hits / max(1, self.hits + self.misses)


class SteppedPipeline:
    """A pipeline that behaves like the diffusers pipeline that it came from, at the recorded number of steps.

    Calling it starts a `Run`: denoiser calls are counted, and the cache schedule decides which are full.
    Calling `.pipe` itself makes full calls only.
    """

    _way_out = ""  # where there is another one: what else to do about another number of steps

    def __init__(self, pipe: DiffusionPipeline, *, num_inference_steps: int) -> None:
        self.pipe = pipe
        self.num_inference_steps = num_inference_steps
        self._counts: dict[StepKind, int] = {"full": 0, "cached": 0}
        self._counting = threading.Lock()

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
            ArtifactMismatchError: another `num_inference_steps` than recorded.
        """
        return self.start().pipe(**self.arguments(kwargs, args))

    def start(
        self,
        *,
        denoiser: Denoiser | None = None,
        decide: Callable[[CallView], Evaluation] | None = None,
        remembers: int = 1,
    ) -> Run:
        """Return a fresh run, see `Run`; `run.pipe(**pipeline.arguments(kwargs))` samples with it, once."""
        return Run(self.pipe, denoiser=denoiser, decide=decide, remembers=remembers, count=self._count)

    def cache_info(self) -> CacheInfo:
        """Return the calls of all runs so far, corrected ones and interrupted ones included.

        Evaluations that a correction adds to a step read no cache, and are not counted.
        """
        with self._counting:
            return CacheInfo(hits=self._counts["cached"], misses=self._counts["full"])

    def _count(self, kind: StepKind) -> None:
        with self._counting:
            self._counts[kind] += 1

    def arguments(self, kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> dict[str, Any]:
        """Return the call's arguments by name, with the recorded number of steps filled in and checked.

        Raises:
            ArtifactMismatchError: another `num_inference_steps` than recorded.
            TypeError: `args` are more than the pipeline takes, or repeat what `kwargs` name.
        """
        kwargs = self.named(kwargs, args)
        asked = kwargs.get("num_inference_steps", self.num_inference_steps)
        if asked != self.num_inference_steps:
            raise ArtifactMismatchError(
                f"num_inference_steps={asked}, but {self.num_inference_steps} were recorded, and the "
                f"activation scales belong to them; leave it out{self._way_out}, or calibrate again "
                f"with num_inference_steps={asked}"
            )
        return {**kwargs, "num_inference_steps": self.num_inference_steps}

    def named(self, kwargs: Mapping[str, Any], args: Sequence[Any]) -> dict[str, Any]:
        """Return all arguments of a call by name.

        Raises:
            TypeError: `args` are more than the pipeline takes, or repeat what `kwargs` name.
        """
        if not args:
            return dict(kwargs)
        bound = inspect.signature(type(self.pipe).__call__).bind_partial(self.pipe, *args, **kwargs)
        return dict(list(bound.arguments.items())[1:])
