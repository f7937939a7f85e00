"""Correction of an artifact's diffusers pipeline itself, for code that calls that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from diffusers import DiffusionPipeline

from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.plans import Plan
from errata.correct.stats import RunStats
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.stepped_unet import SteppedUNet

_ATTACHMENT = "_errata_attachment"


def attach(
    pipe: DiffusionPipeline | DeployedPipeline, plan: Plan, *, batch_invariant: bool = False
) -> Attachment:
    """Make the diffusers pipeline of an artifact sample as `wrap(deployed, plan)` does, until it is detached.

    Its plain call then uses the cache schedule, with corrections, at the recorded number of steps. Nothing
    else changes: `pipe` gets a class with the same name and another `__call__`, and each call works on a
    private copy, so an exception or an interrupt leaves nothing behind. All other changes to the pipeline
    (another device, its progress bar, a replaced part) have their usual effect. `deployed(…)`, `wrap` and
    copies of the pipeline are not affected.

    Args:
        pipe: `deployed.pipe`, or `deployed` for short.
        plan: as for `wrap`.
        batch_invariant: as for `wrap`.

    Returns:
        An object that detaches it and has the statistics of its calls. It is also a context manager:
        `with attach(deployed.pipe, plan) as attachment:`

    Raises:
        TypeError: it is not the pipeline of a loaded artifact.
        PlanError: it is already corrected; or the plan does not suit the artifact, as for `wrap`.
    """
    deployed = pipe if isinstance(pipe, DeployedPipeline) else _deployed(pipe)
    if getattr(type(deployed.pipe), _ATTACHMENT, None) is not None:
        raise PlanError(
            "this pipeline is already corrected, and two corrections would not know of each other; detach "
            "the first one, or join the plans: plan_a + plan_b"
        )
    return Attachment(wrap(deployed, plan, batch_invariant=batch_invariant))


class Attachment:
    """Made by `attach`.

    Attributes:
        pipe: the diffusers pipeline.
        plan: as given.
        steps: the steps that the plan selects on this artifact.
    """

    def __init__(self, corrected: CorrectedPipeline) -> None:
        self.pipe: DiffusionPipeline = corrected.pipe
        self.plan, self.steps = corrected.plan, corrected.steps
        self._corrected = corrected
        self._original = type(self.pipe)
        self.pipe.__class__ = _corrected_class(self._original, self, corrected)

    @property
    def stats(self) -> RunStats:
        """What the latest finished call did.

        Raises:
            PlanError: there is none yet.
        """
        return self._corrected.stats

    def overhead(self) -> float:
        """Return the overhead of the latest finished call, by the measured costs of evaluations."""
        return self._corrected.overhead()

    def detach(self) -> None:
        """Give the pipeline its own call back; a second time has no effect."""
        if getattr(type(self.pipe), _ATTACHMENT, None) is self:
            self.pipe.__class__ = self._original

    def __enter__(self) -> Attachment:
        """Return the attachment itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()


def _corrected_class(original: Any, attachment: Attachment, corrected: CorrectedPipeline) -> type[Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return corrected(*args, **kwargs)

    return class_with_call(original, call, {_ATTACHMENT: attachment})


def class_with_call(
    original: Any, call: Callable[..., Any], members: Mapping[str, Any] | None = None
) -> type[Any]:
    """Return a class like `original` with another `__call__`, for a single object of it.

    Python looks up `__call__` on the class, so an object whose call changes needs a class of its own. What is
    copied or pickled of it is of `original` again.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (original,), self.__getstate__()

    shown = {name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")}
    changed = {"__call__": functools.wraps(original.__call__)(call), "__reduce_ex__": reduce}
    return type(original.__name__, (original,), {**shown, **changed, **(members or {})})


def _blank(kind: type[DiffusionPipeline]) -> Any:
    """Return an instance whose state is still to be set, for `copy` and `pickle`."""
    return object.__new__(kind)


def _deployed(given: object) -> DeployedPipeline:
    """Return the artifact whose pipeline this is."""
    deployed = DeployedPipeline.of(given) if isinstance(given, DiffusionPipeline) else None
    if deployed is not None:
        return deployed
    name = type(given).__name__
    if isinstance(given, SteppedPipeline) or isinstance(getattr(given, "unet", None), SteppedUNet):
        raise TypeError(
            f"attach() takes the pipeline of a loaded artifact, and this {name} belongs to none: freeze it "
            "first, and pass deploy.load(deploy.deploy(compressed, out)).pipe itself"
        )
    if isinstance(given, DiffusionPipeline):
        raise TypeError(
            f"attach() takes the pipeline of a loaded artifact, not a float {name}: compress it, export it "
            "and load it, deploy.load(deploy.deploy(compress.compress(pipe, …), out)).pipe"
        )
    raise TypeError(
        f"attach() takes the pipeline of a loaded artifact, not a {name}: pass deploy.load(path).pipe"
    )
