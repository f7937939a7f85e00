"""Plans of artifacts in closed form, of which the best one is known."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata.cli import plan as plan_command
from errata.correct import IEC, FittedForecast, Forecast, Plan, Refresh, fit_forecast, wrap
from errata.correct.corrector import Method
from errata.correct.fitting import FitChoices
from errata.correct.planner.candidates import Candidate
from errata.correct.planner.planning import CACHE_FREE, plan
from errata.correct.sampling import PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.quality import Reference

Make = Callable[..., Method]
CACHED_CALLS = 8


@pytest.fixture
def candidates(exact: Make, shift: Make) -> list[Candidate]:
    """One that makes everything right for 8 full evaluations, some that cost less, some that do harm."""
    return [
        Candidate(name="worse", plan=Plan(shift(by=0.5)), extra={}),
        Candidate(name="IEC", plan=Plan(IEC()), extra={"full": 4.0}),
        Candidate(name="forecast", plan=Plan(Forecast(order=1)), extra={}),
        Candidate(name="exact", plan=Plan(exact()), extra={"full": float(CACHED_CALLS)}),
        Candidate(name="far off", plan=Plan(shift(by=-1.0)), extra={}),
    ]


def test_the_exact_candidate_is_found(deployed: DeployedPipeline, candidates: list[Candidate]) -> None:
    found = plan(deployed, 2.0, samples=16, candidates=candidates, progress=False)
    assert found.method == candidates[3].plan.method
    expected = found.expected
    assert expected is not None
    assert expected.value == pytest.approx(0, abs=1e-9)
    assert expected.uncorrected > 1e-3
    assert expected.change == pytest.approx(-expected.uncorrected)
    assert expected.is_better
    assert expected.overhead == pytest.approx(CACHED_CALLS / 6)  # a plain run costs 4 + 8 / 4
    assert (expected.reference, expected.candidates_tried) == (CACHE_FREE, 6)


def test_the_exact_candidate_is_found_by_its_features_too(
    deployed: DeployedPipeline, candidates: list[Candidate], reference: Reference
) -> None:
    del candidates[1]  # as good, as far as so many images tell, and cheaper
    exact = candidates[2].plan
    found = plan(deployed, 2.0, reference, samples=64, candidates=candidates, progress=False)
    assert found.method == exact.method
    assert found.expected is not None
    assert found.expected.metric == "Fréchet distance in quarters"
    assert found.expected.reference == "images of the artifact without a cache"
    assert found.expected.is_better


def test_a_plan_above_the_budget_is_never_sampled(
    deployed: DeployedPipeline, candidates: list[Candidate]
) -> None:
    denoiser: Any = deployed.denoiser
    free = [each for each in candidates if not each.extra]
    plan(deployed, 0.0, samples=8, candidates=free, progress=False)
    expected, denoiser.calls = denoiser.calls, []
    plan(deployed, 0.0, samples=8, candidates=candidates, progress=False)
    assert denoiser.calls == expected


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5, 1.0, 4.0])
def test_the_plan_keeps_to_the_budget(
    deployed: DeployedPipeline, reference: Reference, budget: float
) -> None:
    for real in (None, reference):
        found = plan(deployed, budget, real, samples=16, progress=False)
        corrected = wrap(deployed, found)
        PlanSampler(deployed, found, seed=5, inputs=default_inputs).sample(range(4))
        corrected(**default_inputs(range(2)), generator=_generators(2), output_type="np")
        assert corrected.overhead() <= budget + 1e-9
        assert found.expected is not None
        assert found.expected.overhead == pytest.approx(corrected.overhead(), abs=1e-9)


def test_a_forecast_is_fitted_to_images_that_nothing_else_uses(
    deployed: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def noted(deployed: DeployedPipeline, **options: Any) -> FittedForecast:
        asked.append(options)
        return fit_forecast(deployed, **options)

    monkeypatch.setattr("errata.correct.planner.planning.fit_forecast", noted)
    found = plan(deployed, 0.0, samples=8, batch_size=4, seed=3, progress=False)
    assert [(each["seed"], each["samples"], each["batch_size"]) for each in asked] == [(3 + 2 * 8, 8, 4)]
    assert found.expected is not None
    tried = found.expected.candidates_tried
    monkeypatch.setattr("errata.correct.planner.planning.fit_forecast", lambda *args, **options: None)
    without = plan(deployed, 0.0, samples=8, batch_size=4, seed=3, progress=False).expected
    assert without is not None
    assert tried == without.candidates_tried + 2  # alone, and with Hindsight


def test_with_budget_enough_a_run_without_a_cache_agrees_entirely(deployed: DeployedPipeline) -> None:
    found = plan(deployed, 1.0, samples=16, progress=False)
    assert (found.method, found.steps) == (Refresh(), "all")
    assert found.expected is not None
    assert found.expected.value == 0


def test_a_tie_goes_to_the_cheaper(deployed: DeployedPipeline, exact: Make) -> None:
    refreshed = Candidate(
        name="refreshed", plan=Plan(Refresh()), extra={"full": CACHED_CALLS, "cached": -CACHED_CALLS}
    )
    dear = Candidate(name="exact", plan=Plan(exact()), extra={"full": CACHED_CALLS})
    for candidates in ([refreshed, dear], [dear, refreshed]):
        found = plan(deployed, 2.0, samples=8, candidates=candidates, progress=False)
        assert found.method == Refresh()


def test_where_nothing_helps_the_plan_corrects_nothing(deployed: DeployedPipeline, shift: Make) -> None:
    candidates = [Candidate(name=f"{by}", plan=Plan(shift(by=by)), extra={}) for by in (0.5, -1.0)]
    found = plan(deployed, 1.0, samples=8, candidates=candidates, progress=False)
    assert found.corrects_nothing
    assert found.artifact == "f" * 64
    assert found.expected is not None
    assert not found.expected.is_better
    assert (found.expected.change, found.expected.overhead) == (0, 0)
    assert found.expected.value == found.expected.uncorrected
    assert plan(deployed, 1.0, samples=8, candidates=[], progress=False).corrects_nothing


def test_luck_on_the_images_of_the_search_is_found_out(deployed: DeployedPipeline, fickle: Make) -> None:
    latest = [0]

    def inputs(indices: range) -> dict[str, Any]:
        latest[0] = indices.start
        return {"batch_size": len(indices)}

    for lucky_until, corrects_nothing in ((10, True), (20, False)):
        method = fickle(is_lucky=lambda until=lucky_until: latest[0] < until)
        lucky = Candidate(name="lucky", plan=Plan(method), extra={"full": CACHED_CALLS})
        found = plan(deployed, 2.0, samples=10, inputs=inputs, candidates=[lucky], progress=False)
        assert found.corrects_nothing is corrects_nothing


def test_what_shows_no_promise_is_not_measured_again(deployed: DeployedPipeline, shift: Make) -> None:
    """No correction then stands on the images of the search, all of them."""
    asked: list[range] = []

    def inputs(indices: range) -> dict[str, Any]:
        asked.append(indices)
        return {"batch_size": len(indices)}

    nothing = Candidate(name="nothing", plan=Plan(shift(by=0.0)), extra={})
    found = plan(deployed, 0.0, samples=48, seed=7, inputs=inputs, candidates=[nothing], progress=False)
    assert found.corrects_nothing
    assert found.expected is not None
    assert (found.expected.seed, found.expected.samples, found.expected.change) == (7, 48, 0)
    assert max(indices.stop for indices in asked) == 48
    images = PlanSampler(deployed, Plan.none(), seed=7, inputs=default_inputs).sample(range(48)).images
    free = PlanSampler(deployed, Plan(Refresh()), seed=7, inputs=default_inputs).sample(range(48)).images
    difference = (images - free).double().square().flatten(1).mean(dim=1).sqrt().mean()
    assert found.expected.value == pytest.approx(float(difference), abs=1e-9)
    assert "48 images (seeds from 7)" in found.expected.summary()


@pytest.mark.parametrize("is_real", [False, True])
def test_a_measurement_without_a_gain_ends_at_half_of_its_images(
    is_real: bool, deployed: DeployedPipeline, reference: Reference, fickle: Make
) -> None:
    asked: list[range] = []

    def inputs(indices: range) -> dict[str, Any]:
        asked.append(indices)
        return {"batch_size": len(indices)}

    lucky = fickle(is_lucky=lambda: asked[-1].start < 256)
    found = plan(
        deployed,
        2.0,
        reference if is_real else None,
        samples=256,
        inputs=inputs,
        candidates=[Candidate(name="lucky", plan=Plan(lucky), extra={"full": CACHED_CALLS})],
        progress=False,
    )
    assert found.corrects_nothing
    assert found.expected is not None
    # Of the candidate, half of them; a distance is told for all of them, of no correction alone.
    made = [sum(indices.stop > stop >= indices.start for indices in asked) for stop in (256, 384, 511)]
    assert made == ([2, 1, 1] if is_real else [3, 0, 0])
    assert found.expected.seed == 256


def test_equal_calls_give_equal_plans(
    deployed: DeployedPipeline, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="errata"):
        plans = [plan(deployed, 0.5, reference, samples=40, progress=False) for _ in range(2)]
    half = len(caplog.messages) // 2
    assert plans[0] == plans[1]
    assert caplog.messages[:half] == caplog.messages[half:]


def test_expectations_come_from_images_that_the_search_did_not_use(
    deployed: DeployedPipeline, candidates: list[Candidate]
) -> None:
    batches: list[range] = []

    def inputs(indices: range) -> dict[str, Any]:
        batches.append(indices)
        return {"batch_size": len(indices)}

    found = plan(
        deployed, 2.0, samples=10, batch_size=4, inputs=inputs, candidates=candidates, seed=7, progress=False
    )
    assert found.expected is not None
    assert (found.expected.seed, found.expected.samples) == (17, 10)
    searched = {i for batch in batches for i in batch if i < 10}
    measured = [i for batch in batches for i in batch if i >= 10]
    assert searched == set(range(10))
    assert sorted(measured) == sorted(3 * list(range(10, 20)))  # the target, the plan, and no correction
    again = PlanSampler(deployed, found, seed=17, inputs=default_inputs).sample(range(10)).images
    free = PlanSampler(deployed, Plan(Refresh()), seed=17, inputs=default_inputs).sample(range(10)).images
    difference = (again - free).double().square().flatten(1).mean(dim=1).sqrt().mean()
    assert found.expected.value == pytest.approx(float(difference), abs=1e-9)


def test_a_plan_is_bound_to_its_artifact(deployed: DeployedPipeline, uncached: DeployedPipeline) -> None:
    found = plan(deployed, 1.0, samples=8, progress=False)
    assert found.artifact == deployed.manifest.sha256
    other: Any = uncached.manifest
    other.sha256 = "0" * 64
    with pytest.raises(PlanError, match="artifact"):
        wrap(uncached, found)


def test_without_cache_and_reference_there_is_nothing_to_compare_with(uncached: DeployedPipeline) -> None:
    with pytest.raises(PlanError, match="has no cache; give real images, with `errata plan --ref"):
        plan(uncached, 1.0, samples=8, progress=False)


def test_an_artifact_without_cache_is_planned_by_reference(
    uncached: DeployedPipeline, reference: Reference, shift: Make
) -> None:
    broken = Candidate(name="broken", plan=Plan(shift(by=1.0)), extra={})
    found = plan(uncached, 0.5, reference, samples=32, candidates=[broken], progress=False)
    assert found.corrects_nothing


def test_a_candidate_that_takes_more_than_it_promised_is_an_error(
    deployed: DeployedPipeline, exact: Make
) -> None:
    liar = Candidate(name="liar", plan=Plan(exact()), extra={"full": 1.0})
    with pytest.raises(PlanError, match=r"'liar' promised .*16.67% overhead, but took 133.33%"):
        plan(deployed, 0.5, samples=8, candidates=[liar], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_overhead": -0.1}, "max_overhead=-0.1"),
        ({"max_overhead": float("nan")}, "max_overhead=nan"),
        ({"max_overhead": "15%"}, "max_overhead='15%'"),
        ({"max_overhead": 15}, "max_overhead=15 would allow 1500% more compute.*write 0.15 for 15 %"),
        ({"samples": 1}, "samples=1: it must be at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(
    deployed: DeployedPipeline, arguments: dict[str, Any], message: str
) -> None:
    denoiser: Any = deployed.denoiser
    with pytest.raises(PlanError, match=message):
        plan(deployed, **arguments)
    assert denoiser.calls == []


def test_only_artifacts_are_planned_for(deployed: DeployedPipeline) -> None:
    with pytest.raises(TypeError, match="not a ImagePipeline: pass what deploy.load"):
        plan(deployed.pipe)  # type: ignore[arg-type]


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_the_command_knows_how_many_images_a_forecast_is_fitted_to() -> None:
    """It counts prompts before anything slow is imported, so the number stands there once more."""
    assert FitChoices().samples == plan_command.FITTED_TO


def test_a_decided_search_makes_fewer_images(deployed: DeployedPipeline, exact: Make, shift: Make) -> None:
    """All of them would be 2 * 256 for the best one, and 128 at least for any other."""
    asked: list[range] = []

    def inputs(indices: range) -> dict[str, Any]:
        asked.append(indices)
        return {"batch_size": len(indices)}

    candidates = [Candidate(name=f"{by}", plan=Plan(shift(by=by)), extra={}) for by in (0.5, -1.0, 2.0)]
    right = Candidate(name="exact", plan=Plan(exact()), extra={"full": float(CACHED_CALLS)})
    found = plan(deployed, 2.0, samples=256, inputs=inputs, candidates=[*candidates, right], progress=False)
    assert found.method == right.plan.method
    assert found.expected is not None
    assert found.expected.is_better
    assert found.expected.seed == 256
    assert 64 <= found.expected.samples < 256
    searched = [indices for indices in asked if indices.start < 256]
    assert max(indices.stop for indices in searched) <= 32
