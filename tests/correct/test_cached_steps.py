"""Forecast, Lookahead, Refresh and Hindsight on a denoiser whose feature drifts in a known way."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from errata import deploy
from errata.correct import (
    IEC,
    Forecast,
    Hindsight,
    Langevin,
    Lookahead,
    NoiseLevels,
    Plan,
    Refresh,
    SecondOrder,
    wrap,
)
from errata.correct.corrector import Method
from errata.correct.methods.hindsight import growth
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule, StepKind

Deploy = Callable[..., DeployedPipeline]
STEPS, INTERVAL = 16, 5
NOISE = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)


class Drifting:
    """ε = feature = drift(step), whatever x is; a cached call returns the feature that it is given.

    `read` has what cached calls read, by step, and whether it was called extrapolated; `full_at` where full
    calls were made.
    """

    def __init__(self, drift: Callable[[float], float], schedule: CacheSchedule, timesteps: Any) -> None:
        self.drift, self.schedule, self.timesteps = drift, schedule, timesteps
        self.read: dict[int, tuple[float, bool]] = {}
        self.full_at: list[tuple[int, Tensor]] = []

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        self.full_at.append((step, x))
        value = torch.full_like(x, self.drift(step))
        return value, value

    def cached(
        self,
        x: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor,
        *,
        is_extrapolated: bool = False,
    ) -> Tensor:
        self.read[step] = (feature.mean().item(), is_extrapolated)
        return feature

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        return {"full": 1.0, "cached": 0.25}[kind]


@pytest.fixture
def drifting(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> Callable[..., DeployedPipeline]:
    """`drifting(drift)`: full steps at 0, 5, 10 and 15 of 16."""

    def make(drift: Callable[[float], float], scheduler: Any = ddim) -> DeployedPipeline:
        schedule = CacheSchedule.uniform(STEPS, interval=INTERVAL, branch=1)
        deployed = deploy_closed_form(lambda x, i: x, scheduler, STEPS, schedule=schedule)
        unet = deployed.pipe.unet
        unet.denoiser = Drifting(drift, schedule, unet.denoiser.timesteps)
        return deployed

    return make


def sample(deployed: DeployedPipeline, plan: Plan) -> Tensor:
    drawn: Tensor = wrap(deployed, plan)(latents=NOISE)
    return drawn


def read(deployed: DeployedPipeline) -> dict[int, float]:
    denoiser: Any = deployed.denoiser
    return {step: value for step, (value, _) in denoiser.read.items()}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_forecast_knows_a_polynomial_of_its_order(drifting: Any, order: int) -> None:
    def drift(step: float) -> float:
        return 0.5 + 0.3 * step - 0.04 * step**order

    deployed = drifting(drift)
    sample(deployed, Plan(Forecast(order=order)))
    known = read(deployed)
    first_exact = INTERVAL * order  # the full step that completes what is needed
    for step in range(1, STEPS):
        if step in known:
            is_exact = known[step] == pytest.approx(drift(step), abs=1e-12)
            assert is_exact == (step > first_exact)
    assert [known[step] for step in range(1, INTERVAL)] == [drift(0)] * (INTERVAL - 1)  # plain reuse


def test_forecast_takes_the_order_that_the_known_features_allow(drifting: Any) -> None:
    deployed = drifting(lambda step: 2.0 * step)
    sample(deployed, Plan(Forecast(order=3)))
    assert read(deployed)[7] == pytest.approx(14.0)  # a line, after two full steps


def test_forecast_works_at_the_selected_steps_only(drifting: Any) -> None:
    deployed = drifting(lambda step: float(step))
    sample(deployed, Plan(Forecast(order=1), "8-12"))
    known = read(deployed)
    assert [known[step] for step in (7, 8, 9, 11, 12, 13)] == [5, 8, 9, 11, 12, 10]


def test_forecast_costs_nothing(drifting: Any) -> None:
    corrected = wrap(drifting(lambda step: step), Plan(Forecast()))
    corrected(latents=NOISE)
    assert corrected.stats.extra == {}
    assert corrected.overhead() == 0.0


def test_what_was_extrapolated_is_said_to_the_denoiser(drifting: Any) -> None:
    deployed = drifting(lambda step: float(step))
    sample(deployed, Plan(Forecast(order=1)))
    denoiser: Any = deployed.denoiser
    assert {step for step, (_, is_extrapolated) in denoiser.read.items() if is_extrapolated} == {
        6, 7, 8, 9, 11, 12, 13, 14,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers 0.42
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), EulerDiscreteScheduler()], ids=["ddim", "euler"]
)
def test_lookahead_evaluates_where_one_ddim_step_leads(drifting: Any, scheduler: Any) -> None:
    deployed = drifting(lambda step: 0.1 * step, scheduler)
    corrected = wrap(deployed, Plan(Lookahead()))
    corrected(latents=NOISE)
    denoiser: Any = deployed.denoiser
    assert [step for step, _ in denoiser.full_at] == [0, 2, 5, 7, 10, 12, 15]
    levels = NoiseLevels.of(scheduler, denoiser.timesteps, num_inference_steps=STEPS)
    start = NOISE * levels.noise[0] if levels.scales_input else NOISE
    ahead = levels.signal[2] * start / levels.signal[0]  # ε is 0 at step 0
    expected = ahead / (levels.noise[2] ** 2 + 1) ** 0.5 if levels.scales_input else ahead
    torch.testing.assert_close(denoiser.full_at[1][1], expected, rtol=1e-6, atol=1e-6)
    assert corrected.stats.extra == {"full": 3.0}
    assert corrected.overhead() == pytest.approx(3.0 / (4 + 12 * 0.25))


@pytest.mark.parametrize("order", [1, 2])
def test_lookahead_interpolates(drifting: Any, order: int) -> None:
    def drift(step: float) -> float:
        return 1.0 - 0.2 * step + 0.05 * step**order

    deployed = drifting(drift)
    sample(deployed, Plan(Lookahead(order=order)))
    for step, value in read(deployed).items():
        is_exact = value == pytest.approx(drift(step), abs=1e-12)
        # A parabola needs the point of the interval before; the middle itself is always right.
        assert is_exact == (step > INTERVAL * (order - 1) or step == 2)


@pytest.mark.parametrize(("position", "middles"), [(0.2, [1, 6, 11]), (0.8, [4, 9, 14]), (1.0, [5, 10, 15])])
def test_lookahead_looks_where_it_is_told(drifting: Any, position: float, middles: list[int]) -> None:
    deployed = drifting(lambda step: 0.1 * step)
    sample(deployed, Plan(Lookahead(position=position)))
    denoiser: Any = deployed.denoiser
    looked = [step for step, _ in denoiser.full_at]
    assert sorted(looked) == sorted([0, 5, 10, 15, *middles])


def test_lookahead_pays_for_the_selected_intervals_only(drifting: Any) -> None:
    deployed = drifting(lambda step: float(step))
    corrected = wrap(deployed, Plan(Lookahead(), "6-9"))
    corrected(latents=NOISE)
    assert corrected.stats.extra == {"full": 1.0}
    assert [read(deployed)[step] for step in (4, 6, 9, 11)] == [0, 6, 9, 10]


def test_lookahead_needs_noise_levels(drifting: Any) -> None:
    class Unknown(DDIMScheduler):  # type: ignore[misc]
        """Another rule under another name."""

    with pytest.raises(PlanError, match="Lookahead needs the noise level.*such as IEC or Forecast"):
        wrap(drifting(lambda step: step, Unknown(clip_sample=False)), Plan(Lookahead()))


def test_refresh_makes_full_steps_of_cached_ones(drifting: Any) -> None:
    deployed = drifting(lambda step: float(step))
    corrected = wrap(deployed, Plan(Refresh(), "middle"))
    corrected(latents=NOISE)
    denoiser: Any = deployed.denoiser
    assert [step for step, _ in denoiser.full_at] == [0, 2, 5, 7, 10, 12, 15]
    assert [read(deployed)[step] for step in (1, 3, 4, 6, 8)] == [0, 2, 2, 5, 7]
    # A correction that was fitted for the older feature is left out.
    assert [denoiser.read[step][1] for step in (1, 3, 4, 6, 8)] == [False, True, True, False, True]
    assert corrected.stats.extra == {"full": 3.0, "cached": -3.0}
    assert corrected.stats.evaluations == {"full": 7.0, "cached": 9.0}
    assert corrected.stats.steps[2].evaluations == {"full": 1.0}
    assert corrected.overhead() == pytest.approx(3 * 0.75 / (4 + 12 * 0.25))


def test_refreshing_all_is_the_artifact_without_a_cache(tiny_artifact: Callable[[str], Path]) -> None:
    """Weights and ranges of `w8a8+deepcache-3` are those of `w8a8`; so are its full steps, bit for bit."""
    plain, cached = (deploy.load(tiny_artifact(name)) for name in ("w8a8", "w8a8+deepcache-3"))
    asked: dict[str, Any] = {"batch_size": 3, "output_type": "np"}
    expected = plain(**asked, generator=torch.Generator().manual_seed(0)).images
    refreshed = wrap(cached, Plan(Refresh()))
    assert (refreshed(**asked, generator=torch.Generator().manual_seed(0)).images == expected).all()
    assert abs(cached(**asked, generator=torch.Generator().manual_seed(0)).images - expected).max() > 1e-3


def test_forecast_reads_what_was_refreshed(drifting: Any) -> None:
    deployed = drifting(lambda step: float(step))
    sample(deployed, Plan(Refresh(), "2") + Plan(Forecast(order=1)))
    assert [read(deployed)[step] for step in (1, 3, 4)] == pytest.approx([0, 2, 2])
    assert read(deployed)[6] == pytest.approx(6.0)


def test_hindsight_takes_back_a_linear_error_exactly(drifting: Any) -> None:
    """ε drifts linearly and is reused: the jump at a full step is the whole of it."""

    def drift(step: float) -> float:
        return 0.3 - 0.05 * step

    right = sample(drifting(drift), Plan(Refresh(), "all"))
    stale = sample(drifting(drift), Plan.none())
    taken_back = sample(drifting(drift), Plan(Hindsight()))
    torch.testing.assert_close(taken_back, right, rtol=0, atol=1e-6)  # the scheduler's table is float32
    assert (stale - right).abs().min() > 1e-3
    half = sample(drifting(drift), Plan(Hindsight(gain=0.5)))
    torch.testing.assert_close(half, (right + stale) / 2, rtol=0, atol=1e-6)


def test_hindsight_takes_back_what_a_forecast_of_a_parabola_missed(drifting: Any) -> None:
    """After the second full step, from where on there is a forecast; the steps before it are alike in all."""

    def drift(step: float) -> float:
        return 0.3 - 0.005 * step**2

    right = sample(drifting(drift), Plan(Refresh(), "6-14"))
    forecast, hindsight = Plan(Forecast(order=1)), Plan(Hindsight(), "10,15")
    missed = float((sample(drifting(drift), forecast) - right).abs().max())
    left = float((sample(drifting(drift), forecast + hindsight) - right).abs().max())
    assert left < 1e-6
    assert missed > 1e-2


@pytest.mark.parametrize("method", [Forecast(), Lookahead()])
def test_hindsight_before_what_it_judges_is_refused(drifting: Any, method: Method) -> None:
    deployed, name = drifting(lambda step: step), type(method).__name__
    with pytest.raises(PlanError, match=f"Hindsight comes before {name}.*{name.lower()}\\+hindsight"):
        wrap(deployed, Plan(Hindsight()) + Plan(Refresh(), "3") + Plan(method))
    wrap(deployed, Plan(method) + Plan(Hindsight()))


def test_hindsight_takes_back_what_a_lookahead_on_a_parabola_missed(drifting: Any) -> None:
    def drift(step: float) -> float:
        return 0.3 - 0.005 * step**2

    right = sample(drifting(drift), Plan(Refresh(), "all"))
    lookahead = Plan(Lookahead(position=0.4))
    missed = float((sample(drifting(drift), lookahead) - right).abs().max())
    left = float((sample(drifting(drift), lookahead + Plan(Hindsight())) - right).abs().max())
    assert left < 1e-6
    assert missed > 1e-2


def test_hindsight_learns_nothing_from_a_point_that_was_looked_at(drifting: Any) -> None:
    def drift(step: float) -> float:
        return 0.3 - 0.005 * step**2

    lookahead = Plan(Lookahead(position=1.0))
    alone = sample(drifting(drift), lookahead)
    assert sample(drifting(drift), lookahead + Plan(Hindsight())).equal(alone)


def test_hindsight_costs_nothing_and_may_be_placed(drifting: Any) -> None:
    corrected = wrap(drifting(lambda step: 0.1 * step), Plan(Hindsight(), "10"))
    corrected(latents=NOISE)
    assert corrected.steps == (10,)
    assert corrected.stats.extra == {}


@pytest.mark.parametrize("refreshed", ["4,9,14", "2", "1-3,7,11"])
def test_hindsight_judges_what_was_stale_before_a_refreshed_step(drifting: Any, refreshed: str) -> None:
    def drift(step: float) -> float:
        return 0.3 - 0.05 * step

    right = sample(drifting(drift), Plan(Refresh(), "all"))
    alone = sample(drifting(drift), Plan(Refresh(), refreshed))
    for plan in (
        Plan(Refresh(), refreshed) + Plan(Hindsight()),
        Plan(Hindsight()) + Plan(Refresh(), refreshed),
    ):
        torch.testing.assert_close(sample(drifting(drift), plan), right, rtol=0, atol=1e-6)
    assert (alone - right).abs().min() > 1e-2


def test_hindsight_judges_the_last_interval_where_a_step_of_it_is_refreshed(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    """Full steps at 0 and 5 of 8: what goes stale after 5 shows at 7 only."""
    schedule = CacheSchedule.uniform(8, interval=5, branch=1)

    def drawn(plan: Plan) -> Tensor:
        deployed = deploy_closed_form(lambda x, i: x, ddim, 8, schedule=schedule)
        unet = deployed.pipe.unet
        unet.denoiser = Drifting(lambda step: 0.3 - 0.05 * step, schedule, unet.denoiser.timesteps)
        return sample(deployed, plan)

    right = drawn(Plan(Refresh(), "all"))
    left = drawn(Plan(Refresh(), "7") + Plan(Hindsight()))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    assert (drawn(Plan(Hindsight())) - right).abs().min() > 1e-3


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers 0.42
@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, UniPCMultistepScheduler, PNDMScheduler])
@pytest.mark.parametrize("method", [Hindsight(), Langevin()])
def test_a_scheduler_that_forgets_a_changed_sample_is_refused(
    deploy_closed_form: Deploy, kind: type[Any], method: Method
) -> None:
    scheduler = kind()
    calls = len(_fresh(scheduler).timesteps)
    schedule = CacheSchedule.uniform(calls, interval=3, branch=1)
    deployed = deploy_closed_form(lambda x, i: x, scheduler, STEPS, schedule=schedule)
    with pytest.raises(PlanError, match="goes back to earlier samples.*sample with DDIM"):
        wrap(deployed, Plan(method))


def _fresh(scheduler: Any) -> Any:
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(STEPS)
    return fresh


def test_a_cache_without_cached_steps_in_two_calls_has_nothing_stale() -> None:
    assert Hindsight().serves(CacheSchedule.uncached(8, calls_per_step=2)) == ()


def test_a_feature_of_another_step_is_read_as_that_step_s(drifting: Any) -> None:
    """SecondOrder leaves the feature of the next call in the cache, which lies on the line all the same."""
    deployed = drifting(lambda step: 0.1 * step)
    sample(deployed, Plan(SecondOrder(cache_after="replace")) + Plan(Forecast(order=1)))
    denoiser: Any = deployed.denoiser
    assert read(deployed)[8] == pytest.approx(0.8)
    assert denoiser.read[2] == (pytest.approx(0.1), True)  # no scheduled full step's


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Lookahead()) + Plan(Forecast()),
        Plan(Refresh()) + Plan(Lookahead()),
        Plan(Lookahead(), "6-9") + Plan(Lookahead(order=2)),
    ],
)
def test_looking_ahead_for_nothing_is_refused(drifting: Any, plan: Plan) -> None:
    with pytest.raises(PlanError, match="Lookahead would spend an evaluation on steps 6 to 9|steps 1 to 4"):
        wrap(drifting(lambda step: step), plan)


def test_lookahead_on_a_parabola_uses_the_interval_before_only(drifting: Any) -> None:
    deployed = drifting(lambda step: 0.1 * step**2)
    sample(deployed, Plan(Lookahead(order=2), "1-4,11-14"))
    assert read(deployed)[11] != pytest.approx(12.1)
    assert read(deployed)[12] == pytest.approx(14.4)  # where it looked


@pytest.mark.parametrize("reads", [(5,), (10, 3), (10, 5, 1)])
def test_the_growth_of_an_error_is_that_of_the_next_power(reads: tuple[int, ...]) -> None:
    """What a polynomial through these steps misses of the next power, relative to what it misses at 14."""
    order = len(reads)
    polynomial = np.polynomial.Polynomial.fit(reads, [float(step) ** order for step in reads], order - 1)
    at_end = 14.0**order - polynomial(14)
    for step in (11, 12, 13):
        missed = float(step) ** order - polynomial(step)
        assert growth(step, 14, reads) == pytest.approx(missed / at_end)


@pytest.mark.parametrize(
    ("method", "choices", "text"),
    [
        (Forecast, {"order": 0}, r"Forecast\(order=0\): order must be 1, 2 or 3"),
        (Forecast, {"basis": "taylor"}, 'basis must be "newton" or "hermite"'),
        (Forecast, {"sigma": 0.0}, r"sigma must be in \(0, 1\]"),
        (Lookahead, {"position": 0.0}, r"Lookahead\(position=0.0\): position must be in \(0, 1\]"),
        (Lookahead, {"order": 3}, "order must be 1 or 2"),
        (Hindsight, {"gain": 0}, r"gain must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range(method: Any, choices: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        method(**choices)


@pytest.mark.parametrize("method", [Forecast(), Lookahead(), Refresh(), Hindsight()])
def test_an_uncached_artifact_has_nothing_for_them(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, method: Method
) -> None:
    deployed = deploy_closed_form(lambda x, i: x, ddim, 4)
    with pytest.raises(PlanError, match="cannot correct any step of this artifact: it has no cache"):
        wrap(deployed, Plan(method))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Forecast(order=3, basis="hermite", sigma=0.7), "first:9"),
        Plan(Lookahead(position=0.3, order=2)) + Plan(IEC()),
        Plan(Refresh(), "middle") + Plan(Hindsight(gain=0.7)) + Plan(IEC(), "ends:1/4"),
    ],
)
def test_json_gives_the_plan_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
