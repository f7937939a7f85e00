"""Refresh: evaluate some of the cached steps in full.

It does what a shorter cache interval would have done, but after deployment: every quantizer of an artifact
has a range at every step, so any cached step can be made in full. Its feature replaces the stored one, and an
error correction that was fitted for the older feature is left out until the next scheduled full step.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import CallView, Corrector, CorrectorContext, Evaluation
from errata.correct.methods.forecast import cached_steps
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class Refresh(StoredDataclass):
    """The selected cached steps in full; each costs the difference of the two kinds of call.

    `Plan(Refresh(), "middle")` halves every interval; `Plan(Refresh(), "all")` is the artifact without cache.
    """

    traits = Traits(refreshes=True)

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the cached steps."""
        return cached_steps(schedule)

    def check(self, context: CorrectorContext) -> None:
        """Accept every scheduler."""

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Refreshing(context)


class _Refreshing(Corrector):
    """Refresh on one run."""

    def __init__(self, context: CorrectorContext) -> None:
        super().__init__(context)
        self._steps = self.taps
        self.taps = frozenset()

    def before_call(self, view: CallView) -> Evaluation | None:
        return Evaluation(kind="full") if view.step in self._steps else None
