"""Methods of somebody else's get the checks of errata's own, by the traits that they declare."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

from errata.correct import (
    IEC,
    CallView,
    Correction,
    Corrector,
    CorrectorContext,
    Evaluation,
    Forecast,
    Hindsight,
    Langevin,
    Plan,
    Refresh,
    StepView,
    Traits,
    wrap,
)
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 6


def network(x: Tensor, step: int) -> Tensor:
    return torch.sin(2 * x + step)


def latents() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=Generator().manual_seed(5))


@pytest.fixture
def deployed(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=2, branch=1)
    return deploy_closed_form(network, ddim, STEPS, schedule=schedule)


class Old:
    """A method by the protocol before traits: it says nothing of what it does."""

    def __init__(self, kind: type[Corrector]) -> None:
        self._kind = kind

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return tuple(range(schedule.num_steps))

    def check(self, setting: CorrectorContext) -> None:
        assert setting.schedule.num_steps == STEPS

    def corrector(self, setting: CorrectorContext) -> Corrector:
        return self._kind(setting)


class Foreign(Old):
    """The same, with traits."""

    def __init__(self, kind: type[Corrector], **traits: Any) -> None:
        super().__init__(kind)
        self.traits = Traits(**traits)


class Extrapolating(Corrector):
    """Chooses the feature of every cached call."""

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.kind == "full":
            return None
        return Evaluation(kind="cached", feature=1.1 * view.stored[-1][1], reads=(view.stored[-1][0],))


class Halving(Corrector):
    """Changes every prediction."""

    def at_step(self, view: StepView) -> Correction:
        return Correction(prediction=0.5 * view.prediction)


class Setting(Corrector):
    """Replaces every sample."""

    def at_step(self, view: StepView) -> Correction:
        return Correction(prediction=view.prediction, prev_sample=0.5 * view.sample)


class Shifting(Corrector):
    """Moves every sample."""

    def at_step(self, view: StepView) -> Correction:
        return Correction(prediction=view.prediction, shift=torch.ones_like(view.sample))


class Refreshing(Corrector):
    """Makes every call in full."""

    def before_call(self, view: CallView) -> Evaluation:
        return Evaluation(kind="full")


def plan(*methods: Any) -> Plan:
    first, *others = [Plan(method) for method in methods]
    for other in others:
        first = first + other
    return first


def test_a_foreign_forecast_does_not_come_after_hindsight(deployed: DeployedPipeline) -> None:
    method = Foreign(Extrapolating, decides_feature=True)
    message = (
        r"Hindsight comes before Foreign.*Put Hindsight after.*Plan\(Foreign\(…\)\) \+ Plan\(Hindsight\(\)\)"
    )
    with pytest.raises(PlanError, match=message):
        wrap(deployed, plan(Hindsight(), method))
    wrap(deployed, plan(method, Hindsight()))(latents=latents())


def test_errata_s_forecast_does_not_come_after_a_foreign_judge(deployed: DeployedPipeline) -> None:
    judge = Foreign(Corrector, judges_features=True)
    with pytest.raises(PlanError, match="Foreign comes before Forecast.*forecast\\+foreign"):
        wrap(deployed, plan(judge, Forecast()))


def test_a_method_that_says_nothing_comes_after_hindsight_only_where_it_chooses_no_feature(
    deployed: DeployedPipeline,
) -> None:
    with pytest.raises(
        PlanError, match="Old comes after Hindsight and does not say.*traits = correct.Traits"
    ):
        wrap(deployed, plan(Hindsight(), Old(Extrapolating)))
    for safe in (plan(Hindsight(), Old(Halving)), plan(Old(Extrapolating), Hindsight())):
        wrap(deployed, safe)(latents=latents())


def test_a_method_that_says_nothing_works_as_before(deployed: DeployedPipeline) -> None:
    denoiser: Any = deployed.denoiser
    corrected = wrap(deployed, plan(Old(Halving)))(latents=latents())
    denoiser.function = lambda x, step: 0.5 * network(x, step)
    assert torch.equal(corrected, deployed(latents=latents()))
    with pytest.raises(PlanError, match="step 0: two methods correct the sample here"):
        wrap(deployed, plan(Langevin(), Old(Halving)))(latents=latents())


def test_a_foreign_method_does_not_change_what_another_one_set(deployed: DeployedPipeline) -> None:
    for first, second in (
        (Langevin(), Foreign(Halving, changes_prediction=True)),
        (Foreign(Setting, sets_sample="always"), IEC()),
    ):
        with pytest.raises(PlanError, match="step 0: two methods correct the sample here"):
            wrap(deployed, plan(first, second))


def test_sets_sample_if_nonlinear_depends_on_the_scheduler(deploy_closed_form: Deploy) -> None:
    both = plan(Foreign(Halving, sets_sample="if_nonlinear"), Foreign(Halving, changes_prediction=True))
    linear, clipping = (DDIMScheduler(clip_sample=clips, set_alpha_to_one=False) for clips in (False, True))
    wrap(deploy_closed_form(network, linear, STEPS), both)
    with pytest.raises(PlanError, match="step 0: two methods correct the sample here"):
        wrap(deploy_closed_form(network, clipping, STEPS), both)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Extrapolating, r"Foreign chose the feature of step 1; declare .*Traits\(decides_feature=True\)"),
        (Refreshing, r"Foreign made the cached step 1 a full one; declare .*Traits\(refreshes=True\)"),
        (Halving, r"at step 0 that it does not declare; .*Traits\(changes_prediction=True\)"),
        (Setting, r"at step 0 that it does not declare; .*Traits\(sets_sample=\"always\"\)"),
        (Shifting, r"at step 0 that it does not declare; .*Traits\(shifts_sample=True\)"),
    ],
)
def test_a_method_does_no_more_than_it_declares(
    deployed: DeployedPipeline, kind: type[Corrector], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        wrap(deployed, plan(Foreign(kind)))(latents=latents())
    wrap(deployed, plan(Old(kind)))(latents=latents())


def test_a_foreign_refresh_is_known_to_hindsight(deployed: DeployedPipeline) -> None:
    seen: list[tuple[int, ...]] = []

    class Watching(Corrector):
        def __init__(self, context: CorrectorContext) -> None:
            super().__init__(context)
            seen.append(context.refreshed)

    wrap(deployed, plan(Foreign(Refreshing, refreshes=True), Old(Watching)))(latents=latents())
    assert seen == [tuple(range(STEPS))]


def test_a_foreign_evaluation_for_nothing_is_refused(deployed: DeployedPipeline) -> None:
    looking = Foreign(Corrector, decides_feature=True, evaluates_intervals=True)
    with pytest.raises(
        PlanError, match="Foreign would spend an evaluation on steps 1 to 1.*put Foreign after"
    ):
        wrap(deployed, plan(looking, Refresh()))


def test_a_foreign_method_for_guided_predictions_needs_guidance(deployed: DeployedPipeline) -> None:
    method = Foreign(Halving, changes_prediction=True, needs_guidance=True)
    with pytest.raises(
        PlanError, match="Foreign corrects guided predictions, and LoopPipeline has no guidance"
    ):
        wrap(deployed, plan(method))


def test_noise_levels_and_kept_samples_are_asked_for(
    deploy_closed_form: Deploy, deployed: DeployedPipeline
) -> None:
    unknown = type("Unknown", (DDIMScheduler,), {})(clip_sample=False)
    of_no_class = deploy_closed_form(network, unknown, STEPS)
    with pytest.raises(PlanError, match="Foreign needs the noise level of every step"):
        wrap(of_no_class, plan(Foreign(Halving, changes_prediction=True, needs_noise_levels=True)))
    with pytest.raises(
        PlanError, match="Foreign changes the sample after a step, but this scheduler goes back"
    ):
        wrap(of_no_class, plan(Foreign(Shifting, shifts_sample=True)))
    wrap(deployed, plan(Foreign(Shifting, shifts_sample=True, needs_noise_levels=True)))(latents=latents())


def test_batch_invariance_is_promised_only_for_methods_that_declare_it(deployed: DeployedPipeline) -> None:
    with pytest.raises(PlanError, match="Old does not say whether it decides for each image.*per_image=True"):
        wrap(deployed, plan(Old(Halving)), batch_invariant=True)
    of_batch = Foreign(Halving, changes_prediction=True, per_image=False)
    with pytest.raises(PlanError, match="decides for a whole batch"):
        wrap(deployed, plan(of_batch), batch_invariant=True)
    alone = Foreign(Halving, changes_prediction=True)
    wrap(deployed, plan(alone), batch_invariant=True)(latents=latents())


def test_the_former_name_of_a_corrector_s_context_works(deployed: DeployedPipeline) -> None:
    class Former(Corrector):
        def at_step(self, view: StepView) -> Correction:
            assert self.setting is self.context
            return Correction(prediction=view.prediction)

    with pytest.warns(DeprecationWarning, match=r"Corrector\.setting is now Corrector\.context"):
        wrap(deployed, plan(Old(Former)))(latents=latents())
