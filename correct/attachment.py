"""Correction for somebody who holds the diffusers pipeline of an artifact, and calls that."""

from __future__ import annotations

import functools
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
    """Lets the diffusers pipeline of an artifact sample as `wrap(deployed, plan)` does, until detached.

    Its plain call then uses the cache schedule, with corrections, at the recorded number of steps. That is
    all that changes: the class of `pipe` gives way to one with the same name and another `__call__`, and each
    call works on a private copy, so an exception or an interrupt leaves nothing behind. Whatever else is done
    to the pipeline (another device, its progress bar, a part replaced) has its usual effect. `deployed(…)`,
    `wrap` and copies of the pipeline do not notice.

    Args:
        pipe: `deployed.pipe`, or `deployed` for short.
        plan: as for `wrap`.
        batch_invariant: as for `wrap`.

    Returns:
        What detaches it, and tells what its calls did. As a context manager it detaches at the end:
        `with attach(deployed.pipe, plan) as attachment:`

    Raises:
        TypeError: it is not the pipeline of a loaded artifact.
        PlanError: it is corrected already; or the plan does not suit the artifact, as for `wrap`.
    """
    deployed = pipe if isinstance(pipe, DeployedPipeline) else _deployed(pipe)
    if getattr(type(deployed.pipe), _ATTACHMENT, None) is not None:
        raise PlanError(
            "this pipeline is corrected already, and two corrections would not know of each other; detach "
            "the first one, or join their plans: plan_a + plan_b"
        )
    return Attachment(wrap(deployed, plan, batch_invariant=batch_invariant))


class Attachment:
    """Made by `attach`.

    Attributes:
        pipe: the diffusers pipeline.
        plan: what was asked for.
        steps: the steps that it comes to.
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
        """Overhead of the latest finished call, by the measured cost of each kind of evaluation."""
        return self._corrected.overhead()

    def detach(self) -> None:
        """Makes the pipeline what it was; once it is, does nothing."""
        if getattr(type(self.pipe), _ATTACHMENT, None) is self:
            self.pipe.__class__ = self._original

    def __enter__(self) -> Attachment:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detaches."""
        self.detach()


def _corrected_class(original: Any, attachment: Attachment, corrected: CorrectedPipeline) -> type[Any]:
    """Like `original` in all but its call. What is copied or pickled of it is of `original` again."""

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return corrected(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (original,), self.__getstate__()

    shown = {name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")}
    members = {"__call__": call, "__reduce_ex__": reduce, _ATTACHMENT: attachment}
    return type(original.__name__, (original,), {**shown, **members})


def _blank(kind: type[DiffusionPipeline]) -> Any:
    """An instance whose state is still to be set, for `copy` and `pickle`."""
    return object.__new__(kind)


def _deployed(given: object) -> DeployedPipeline:
    """The artifact whose pipeline this is."""
    deployed = DeployedPipeline.of(given) if isinstance(given, DiffusionPipeline) else None
    if deployed is not None:
        return deployed
    name = type(given).__name__
    if isinstance(given, SteppedPipeline) or isinstance(getattr(given, "unet", None), SteppedUNet):
        raise TypeError(
            f"attach() takes the pipeline of a loaded artifact, and this {name} is none's: freeze it first, "
            "and pass deploy.load(deploy.export(compressed, out)).pipe itself"
        )
    if isinstance(given, DiffusionPipeline):
        raise TypeError(
            f"attach() takes the pipeline of a loaded artifact, not a float {name}: compress it, export it "
            "and load it, deploy.load(deploy.export(compress.apply(pipe, …), out)).pipe"
        )
    raise TypeError(
        f"attach() takes the pipeline of a loaded artifact, not a {name}: pass deploy.load(path).pipe"
    )
