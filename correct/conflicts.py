"""Methods that cannot correct the same step, told before anything is sampled where that can be known."""

from __future__ import annotations

from collections.abc import Sequence

from errata.correct.corrector import Method
from errata.correct.diffier import DiffIER
from errata.correct.epsilon_scaling import EpsilonScaling
from errata.correct.iec import IEC
from errata.correct.langevin import Langevin
from errata.correct.second_order import SecondOrder
from errata.errors import PlanError


def conflict(step: int) -> PlanError:
    """The error of a step at which a method would start from a sample that an earlier one made."""
    return PlanError(
        f"step {step}: two methods correct the sample here, and what the first one made is no step of the "
        "scheduler that a second one could start from; give them different steps"
    )


def check_conflicts(placed: Sequence[tuple[Method, tuple[int, ...]]], *, is_linear: bool) -> None:
    """Refuses a plan in which one method sets the sample of a step and a later one starts anew there.

    IEC sets samples where the scheduler's step is not linear in the prediction. An argument of the call can
    bend it too (`guidance_rescale`): that shows at the step itself, where `SchedulerHook` refuses it.

    Raises:
        PlanError: naming the first such step.
    """
    taken: set[int] = set()
    for method, steps in placed:
        if isinstance(method, DiffIER | EpsilonScaling | IEC | Langevin | SecondOrder) and (
            shared := taken.intersection(steps)
        ):
            raise conflict(min(shared))
        if isinstance(method, Langevin) or (isinstance(method, IEC) and not is_linear):
            taken.update(steps)
