"""Fitted forecasts on features that grow or decay at known rates, which no polynomial follows."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from errata.correct import FittedForecast, Forecast, Hindsight, Plan, Refresh, fit_forecast, wrap
from errata.correct.methods.fitted_forecast import reads
from errata.deploy import DeployedPipeline
from errata.errors import ErrataError, PlanError
from errata.runtime.schedule import CacheSchedule, StepKind

STEPS, INTERVAL = 16, 5
SHAPE = (3, 2, 2)
FIELDS = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RATES = (0.9, 1.05)  # by step
Deploy = Callable[..., DeployedPipeline]


class Growing:
    """The feature, and ε, is Σ_j RATES_j^step FIELDS_j for every image; `read` has what cached calls read."""

    def __init__(self, schedule: CacheSchedule, timesteps: Any, *, gap: float = 1.0) -> None:
        self.schedule, self.timesteps, self.gap = schedule, timesteps, gap
        self.read: dict[int, Tensor] = {}

    def feature(self, step: int, rows: int) -> Tensor:
        moment = step // self.schedule.calls_per_step
        second = self.gap if step % self.schedule.calls_per_step else 1.0
        field = RATES[0] ** moment * FIELDS[0] + second * RATES[1] ** moment * FIELDS[1]
        return field.expand(rows, *SHAPE)

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        feature = self.feature(step, len(x))
        return feature, feature

    def cached(
        self,
        x: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor,
        *,
        is_extrapolated: bool = False,
    ) -> Tensor:
        self.read[step] = feature
        return feature

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        return {"full": 1.0, "cached": 0.25}[kind]

    def errors(self) -> dict[int, float]:
        """Relative error of what was read, by step."""
        wanted = {step: self.feature(step, len(feature)) for step, feature in self.read.items()}
        return {step: float((self.read[step] - wanted[step]).norm() / wanted[step].norm()) for step in wanted}


@pytest.fixture
def growing(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> DeployedPipeline:
    """Full steps at 0, 5, 10 and 15 of 16."""
    schedule = CacheSchedule.uniform(STEPS, interval=INTERVAL, branch=1)
    deployed = deploy_closed_form(lambda x, i: x, ddim, STEPS, schedule=schedule)
    deployed.pipe.unet.denoiser = Growing(schedule, deployed.denoiser.timesteps)
    return deployed


def latents(batch: range) -> dict[str, Any]:
    return {"latents": torch.zeros(len(batch), *SHAPE, dtype=torch.float64)}


def fit(deployed: DeployedPipeline, **options: Any) -> FittedForecast:
    return fit_forecast(deployed, inputs=latents, progress=False, **options)


def errors(deployed: DeployedPipeline, plan: Plan) -> dict[int, float]:
    denoiser: Any = deployed.denoiser
    denoiser.read.clear()
    wrap(deployed, plan)(**latents(range(2)))
    return denoiser.errors()


def test_two_features_are_enough_for_two_rates(growing: DeployedPipeline) -> None:
    fitted = errors(growing, Plan(fit(growing, order=1, samples=3, batch_size=2)))
    straight = errors(growing, Plan(Forecast(order=1)))
    for step in (6, 7, 8, 9, 11, 12, 13, 14):
        assert fitted[step] < 5e-4
        assert straight[step] > 5e-3
    assert fitted[1] == straight[1] > 0.01  # before the second full step both reuse the first


def test_weights_are_those_of_the_two_rates(growing: DeployedPipeline) -> None:
    rows = fit(growing, order=1, samples=1).weights
    assert [len(row) for row in rows] == [0] * 6 + [2] * 4 + [0] + [2] * 4 + [0]
    for step in (8, 13):
        newest, older = rows[step]
        start = step - step % INTERVAL
        for rate in RATES:  # w_0 r^s_0 + w_1 r^s_1 = r^i
            value = newest * rate**start + older * rate ** (start - INTERVAL)
            assert value == pytest.approx(rate**step, rel=2e-3)


def test_a_higher_order_reads_as_many_as_have_passed(growing: DeployedPipeline) -> None:
    lengths = [len(row) for row in fit(growing, order=3, samples=1).weights]
    assert (lengths[6], lengths[14]) == (2, 3)


def test_images_and_batches_make_no_difference_here(growing: DeployedPipeline) -> None:
    assert fit(growing, samples=5, batch_size=2) == fit(growing, samples=1)


def test_fitting_leaves_the_artifact_alone(growing: DeployedPipeline) -> None:
    before = wrap(growing, Plan.none())(**latents(range(2)))
    fit(growing, samples=2)
    assert torch.equal(wrap(growing, Plan.none())(**latents(range(2))), before)


def test_with_other_features_than_it_was_fitted_for_it_reads_the_polynomial(
    growing: DeployedPipeline,
) -> None:
    fitted, refresh = Plan(fit(growing, order=1, samples=1)), Plan(Refresh(), "7")
    after = errors(growing, refresh + fitted)
    straight = errors(growing, refresh + Plan(Forecast(order=1)))
    assert after[8] == straight[8]  # through 7 and 5
    assert after[6] < 1e-3 < straight[6] / 10


def test_each_call_of_a_step_has_its_own_weights(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    schedule = CacheSchedule.uniform(2 * STEPS, interval=INTERVAL, branch=1, calls_per_step=2)
    assert reads(27, schedule, most=3) == (21, 11, 1)
    assert reads(26, schedule, most=2) == (20, 10)
    deployed = deploy_closed_form(lambda x, i: x, ddim, STEPS, schedule=CacheSchedule.uncached(STEPS))
    twice = tuple(time for time in deployed.denoiser.timesteps for _ in range(2))
    deployed.pipe.unet.denoiser = Growing(schedule, twice, gap=-2.0)
    predict = type(deployed.pipe).predict

    class Guided(type(deployed.pipe)):  # type: ignore[misc]
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return predict(self, x, t) + predict(self, x, t)

    deployed.pipe.__class__ = Guided
    fitted = fit(deployed, order=1, samples=1)
    assert max(error for step, error in errors(deployed, Plan(fitted)).items() if step > 11) < 1e-3
    assert fitted.weights[16] != fitted.weights[17]


def test_it_composes_with_hindsight(growing: DeployedPipeline) -> None:
    plan = Plan(fit(growing, order=2, samples=1)) + Plan(Hindsight())
    assert wrap(growing, plan)(**latents(range(2))).isfinite().all()
    assert wrap(growing, plan).steps == (*range(5, 16),)


def test_weights_of_another_schedule_are_refused(growing: DeployedPipeline) -> None:
    fitted = fit(growing, samples=1)
    shorter = FittedForecast(weights=fitted.weights[:-1])
    moved = FittedForecast(weights=(*fitted.weights[1:], ()))
    for other in (shorter, moved):
        with pytest.raises(PlanError, match="fitted for another cache schedule.*fit_forecast"):
            wrap(growing, Plan(other))


@pytest.mark.parametrize("weights", [(), ((),), None, ((1.0, float("nan")),), (("a",),), (1.0,), ((True,),)])
def test_weights_must_be_finite_numbers(weights: Any) -> None:
    with pytest.raises(PlanError, match="needs finite weights for every denoiser call"):
        FittedForecast(weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be 1, 2 or 3"),
        ({"samples": 0}, "samples must be an integer, 1 or more"),
        ({"batch_size": 1.5}, "batch_size must be an integer, 1 or more"),
        ({"seed": -1}, "seed must be an integer, 0 or more"),
    ],
)
def test_choices_out_of_range_are_refused(
    growing: DeployedPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        fit(growing, **options)


def test_only_artifacts_with_something_to_forecast_are_fitted(
    growing: DeployedPipeline, deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    with pytest.raises(PlanError, match="no cached step after its second full one"):
        fit(deploy_closed_form(lambda x, i: x, ddim, STEPS))
    with pytest.raises(TypeError, match="takes a loaded artifact, not a LoopPipeline"):
        fit(growing.pipe)


def test_features_that_are_not_finite_are_told(growing: DeployedPipeline) -> None:
    denoiser: Any = growing.denoiser
    feature = denoiser.feature
    denoiser.feature = lambda step, rows: feature(step, rows) * (float("inf") if step == 10 else 1)
    with pytest.raises(
        ErrataError, match="the feature of step 11, or of a full step before it, is not finite"
    ):
        fit(growing, samples=1)
