"""The base of methods that correct what the network returns, and act nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from errata.correct.corrector import Corrector, CorrectorContext
from errata.correct.traits import Traits
from errata.runtime.denoiser import Denoiser
from errata.runtime.schedule import CacheSchedule

if TYPE_CHECKING:
    from errata.correct.pipeline import CorrectedPipeline


class NetworkMethod:
    """A method that serves all calls, on any scheduler, and has nothing to do between them."""

    traits = Traits(corrects_network=True)

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return all calls."""
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None:
        """Accept every scheduler."""

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector that does nothing between network and scheduler."""
        return Corrector(context)

    def network_correction(
        self, corrected: CorrectedPipeline, steps: tuple[int, ...]
    ) -> Callable[[Denoiser], Denoiser]:
        """Return a function that wraps a denoiser so that its predictions at `steps` are corrected.

        Asked once, when a plan is attached to an artifact.

        Raises:
            PlanError: the method cannot serve this artifact or this plan.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it corrects the network")
