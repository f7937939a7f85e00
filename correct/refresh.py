"""Refresh: evaluate some of the cached steps in full.

What a shorter cache interval would have bought, decided after deployment: every quantizer of an artifact has
a range at every step, so a cached step can be a full one at any time. Its feature replaces the stored one,
and an error correction that was fitted for the older feature is left out until the next scheduled full step.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import CallView, Corrector, CorrectorContext, Evaluation
from errata.correct.forecast import cached_steps
from errata.runtime.schedule import CacheSchedule


@dataclass(frozen=True, kw_only=True)
class Refresh(StoredDataclass):
    """Turns the selected cached steps into full ones; each costs the difference of the two.

    `Plan(Refresh(), "middle")` halves every interval; `Plan(Refresh(), "all")` is the artifact with no cache.
    """

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The cached steps."""
        return cached_steps(schedule)

    def check(self, setting: CorrectorContext) -> None:
        """See `Method.check`: it works with every scheduler."""

    def corrector(self, setting: CorrectorContext) -> Corrector:
        """See `Method.corrector`."""
        return _Refreshing(setting)


class _Refreshing(Corrector):
    """Refresh on one run."""

    def __init__(self, setting: CorrectorContext) -> None:
        super().__init__(setting)
        self._steps = self.taps
        self.taps = frozenset()

    def before_call(self, view: CallView) -> Evaluation | None:
        return Evaluation(kind="full") if view.step in self._steps else None
