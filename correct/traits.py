"""What a correction method does and needs, as the method itself declares it.

The checks in `errata.correct.plan_check` and the alternatives in a report read these traits. They never ask
for the class of a method, so a method of your own gets the same checks as errata's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from errata.correct.corrector import Corrector, Method
from errata.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The attribute `traits` of a method. What is not named here does not happen.

    Attributes:
        corrects_network: it changes what the network returns, at every evaluation of its steps, those of
            other methods included. Such a method also has the function `network_correction`, see
            `errata.correct.network_method.NetworkMethod`.
        changes_prediction: the scheduler gets another prediction than the pipeline's.
        sets_sample: whether the method replaces the sample that a step returns. Another method cannot change
            the prediction of the same step afterwards. "if_nonlinear" is for methods that need it only where
            the scheduler's step is not linear in the prediction, such as IEC.
        shifts_sample: it adds something to the sample that a step returns.
        decides_feature: it chooses the feature that a cached call reads.
        judges_features: it corrects the error of the features that cached calls read, so it has to come after
            the methods that choose them.
        refreshes: it makes cached calls in full.
        evaluates_intervals: it evaluates once in each cache interval, and uses that at its cached steps.
        is_second_order: it makes second-order steps. A report does not compare it with such a method.
        needs_noise_levels: it needs `CorrectorContext.levels`.
        needs_guidance: it corrects guided predictions only.
        per_image: it decides for each image alone, so an image does not depend on the rest of its batch.
    """

    corrects_network: bool = False
    changes_prediction: bool = False
    sets_sample: Literal["never", "if_nonlinear", "always"] = "never"
    shifts_sample: bool = False
    decides_feature: bool = False
    judges_features: bool = False
    refreshes: bool = False
    evaluates_intervals: bool = False
    is_second_order: bool = False
    needs_noise_levels: bool = False
    needs_guidance: bool = False
    per_image: bool = True


# What a method does that acts on the network and nowhere else.
_NETWORK_ALONE = Traits(corrects_network=True)


class DeclaredMethod(Method, Protocol):
    """A `Method` that says what it does."""

    @property
    def traits(self) -> Traits:
        """Return what this method does and needs; a plain class attribute will do."""


def acts_between(method: object) -> bool:
    """Return whether a method acts around denoiser calls, and not in the network alone."""
    return declared_traits(method) != _NETWORK_ALONE


def declared_traits(method: object) -> Traits | None:
    """Return the traits that a method declares, or None if it declares none.

    Raises:
        PlanError: its attribute `traits` is something else.
    """
    traits = getattr(method, "traits", None)
    if traits is not None and not isinstance(traits, Traits):
        name = type(method).__name__
        raise PlanError(
            f"{name}.traits is {traits!r}; it must be an instance of errata.correct.Traits, such as "
            "Traits(changes_prediction=True)"
        )
    return traits


def traits_of(method: object) -> Traits:
    """Return the traits of a method; of one that declares none, those of a method that does nothing.

    What such a method does is checked where it shows: at the step itself, and in `plan_check` where it could
    choose features unseen.
    """
    return declared_traits(method) or Traits()


def has_second_order_match(method: object) -> bool:
    """Return whether second-order steps at the same place are a fair alternative, for a report."""
    traits = traits_of(method)
    return not (traits.is_second_order or traits.refreshes)


def undeclared(method: object, problem: str, trait: str) -> PlanError:
    """Return the error for a method without the trait that says what it does."""
    name = type(method).__name__
    return PlanError(f"{name} {problem}; declare it in the class, as in traits = correct.Traits({trait})")


def may_decide_features(corrector: Any) -> bool:
    """Return whether a corrector has a `before_call` of its own, with which it can choose features."""
    return getattr(type(corrector), "before_call", None) is not Corrector.before_call
