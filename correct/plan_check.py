"""Checks of a plan against the artifact that it is to correct, by what its methods declare.

`check_plan` asks what holds for an artifact for good, `check_scheduler` what depends on its scheduler, and
`check_call` what depends on the arguments of a call. `check_correction` and `check_evaluation` hold a running
corrector to what its method declared.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from errata.correct.corrector import CallView, Correction, CorrectorContext, Evaluation, Method, StepView
from errata.correct.noise_levels import check_known
from errata.correct.step_rule import check_keeps_samples
from errata.correct.traits import Traits, declared_traits, may_decide_features, traits_of, undeclared
from errata.errors import PlanError
from errata.method_options import command_name
from errata.runtime.schedule import CacheSchedule

Placed = Sequence[tuple[Method, tuple[int, ...]]]
"""The methods of a plan, in order, each with the denoiser calls at which it acts."""

Contexts = Sequence[tuple[Method, CorrectorContext]]


def check_plan(placed: Placed, schedule: CacheSchedule, pipe: Any, *, batch_invariant: bool) -> None:
    """Check the order of the methods, that none is idle, and that pipeline and options suit them.

    Raises:
        PlanError: the first that does not hold.
    """
    _check_evaluations_are_used(placed, schedule)
    _check_order(placed)
    _check_can_guide(placed, pipe)
    if batch_invariant:
        _check_per_image(placed)


def check_scheduler(contexts: Contexts, *, is_linear: bool) -> None:
    """Check what the scheduler has to offer, ask each method, and find steps that two of them claim.

    Raises:
        PlanError: the first that does not hold.
    """
    for method, context in contexts:
        traits = traits_of(method)
        if traits.needs_noise_levels:
            check_known(context.levels, method)
        method.check(context)
        if traits.shifts_sample or traits.sets_sample == "always":
            check_keeps_samples(method, context)
    _check_undeclared_order(contexts)
    _check_shared_steps(contexts, is_linear=is_linear)


def check_call(placed: Placed, guidance_scale: float | None) -> None:
    """Check the guidance scale of a call; None where the pipeline takes none.

    Raises:
        PlanError: a method needs guidance, and this scale does not guide.
    """
    for method in _needing_guidance(placed) if guidance_scale is not None and guidance_scale <= 1 else ():
        raise PlanError(
            f"{_name(method)} corrects guided predictions, and guidance_scale={guidance_scale:g} does not "
            "guide; use a scale above 1, or correct with IEC"
        )


def check_correction(method: Method, correction: Correction, view: StepView) -> None:
    """Check that a correction does no more than its method declares.

    Raises:
        PlanError: naming the step and the trait that is missing.
    """
    traits = declared_traits(method)
    if traits is None:
        return
    changes = correction.prediction is not view.prediction
    problems = {
        "changes_prediction=True": changes and not _claims_steps(traits),
        'sets_sample="always"': correction.prev_sample is not None and traits.sets_sample == "never",
        "shifts_sample=True": correction.shift is not None and not traits.shifts_sample,
    }
    for trait, is_missing in problems.items():
        if is_missing:
            raise undeclared(method, f"made a correction at step {view.step} that it does not declare", trait)


def check_evaluation(method: Method, evaluation: Evaluation, view: CallView) -> None:
    """Check that a decision about a denoiser call is one that its method declares.

    Raises:
        PlanError: naming the step and the trait that is missing.
    """
    traits = declared_traits(method)
    if traits is None:
        return
    if evaluation.kind == "full" and view.kind == "cached" and not traits.refreshes:
        raise undeclared(method, f"made the cached step {view.step} a full one", "refreshes=True")
    reuses = evaluation.kind == "cached" and (evaluation.feature is not None or view.kind == "full")
    if reuses and not traits.decides_feature:
        raise undeclared(method, f"chose the feature of step {view.step}", "decides_feature=True")


def conflict(step: int) -> PlanError:
    """Return the error for a step whose sample one method set and a later method would change."""
    return PlanError(
        f"step {step}: two methods correct the sample here. The first one replaces it, so the second one has "
        "no step of the scheduler to start from; give them different steps"
    )


def _check_order(placed: Placed) -> None:
    judge: Method | None = None
    for method, _ in placed:
        judge = method if judge is None and traits_of(method).judges_features else judge
        if judge is not None and traits_of(method).decides_feature:
            raise _misplaced(judge, method)


def _check_undeclared_order(contexts: Contexts) -> None:
    judge: Method | None = None
    for method, context in contexts:
        judge = method if judge is None and traits_of(method).judges_features else judge
        if judge is None or declared_traits(method) is not None:
            continue
        if may_decide_features(method.corrector(context)):
            raise PlanError(
                f"{_name(method)} comes after {_name(judge)} and does not say whether it chooses the "
                f"features that cached steps read. Put {_name(judge)} last; or, if it only watches, declare "
                "in the class what it does do: traits = correct.Traits(…)"
            )


def _misplaced(judge: Method, decider: Method) -> PlanError:
    judging, deciding = _name(judge), _name(decider)
    return PlanError(
        f"{judging} comes before {deciding}, so it would correct the error of features that are not used. "
        f"Put {judging} after the method that it corrects: Plan({deciding}(…)) + Plan({judging}()), or on "
        f"the command line {command_name(deciding)}+{command_name(judging)}"
    )


def _check_evaluations_are_used(placed: Placed, schedule: CacheSchedule) -> None:
    """Refuse an evaluation for an interval of which other methods decide every step."""
    for place, (method, steps) in enumerate(placed):
        if not traits_of(method).evaluates_intervals:
            continue
        taken = set(_decided_by_others(placed, place))
        for start, end in schedule.groups:
            chosen = {step for step in steps if start < step < end}
            if chosen and chosen <= taken:
                raise PlanError(
                    f"{_name(method)} would spend an evaluation on steps {min(chosen)} to {max(chosen)}, "
                    f"but other methods of the plan decide all of them: put {_name(method)} after them, or "
                    "give them different steps"
                )


def _decided_by_others(placed: Placed, place: int) -> Iterator[int]:
    """Yield the steps that the other methods make in full, or whose feature a later one chooses."""
    for other, (method, steps) in enumerate(placed):
        traits = traits_of(method)
        if other != place and (traits.refreshes or (traits.decides_feature and other > place)):
            yield from steps


def _check_shared_steps(contexts: Contexts, *, is_linear: bool) -> None:
    """Refuse a step whose sample one method sets and a later one changes.

    An argument of the call can make a step non-linear too (`guidance_rescale`): that shows at the step
    itself, where `SchedulerHook` refuses it. So does a correction by a method that declares nothing.
    """
    taken: set[int] = set()
    for method, context in contexts:
        traits = declared_traits(method) or Traits()
        if _claims_steps(traits) and (shared := taken.intersection(context.steps)):
            raise conflict(min(shared))
        if traits.sets_sample == "always" or (traits.sets_sample == "if_nonlinear" and not is_linear):
            taken.update(context.steps)


def _claims_steps(traits: Traits) -> bool:
    return traits.changes_prediction or traits.sets_sample != "never"


def _check_can_guide(placed: Placed, pipe: Any) -> None:
    """Refuse a method for guided predictions on a pipeline that takes no guidance scale."""
    names = [*inspect.signature(type(pipe).__call__).parameters, *dir(type(pipe))]
    if any("guidance" in name for name in names):
        return
    for method in _needing_guidance(placed):
        raise PlanError(
            f"{_name(method)} corrects guided predictions, and {type(pipe).__name__} has no guidance scale; "
            "correct with IEC"
        )


def _check_per_image(placed: Placed) -> None:
    for method, _ in placed:
        traits = declared_traits(method)
        if traits is None:
            problem = "does not say whether it decides for each image alone, which batch_invariant=True needs"
            raise undeclared(method, problem, "per_image=True")
        if not traits.per_image:
            raise PlanError(
                f"batch_invariant=True with {method!r}, which decides for a whole batch, so an image depends "
                "on the others in it; leave batch_invariant out, use batches of 1, or with IEC take "
                'stopping="per_sample"'
            )


def _needing_guidance(placed: Placed) -> list[Method]:
    return [method for method, _ in placed if traits_of(method).needs_guidance]


def _name(method: Method) -> str:
    return type(method).__name__
