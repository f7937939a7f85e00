"""Every method on every pipeline that it serves, guided in one call or in two.

The reference is the pipeline's own code.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sheets import MappedByHand, made_up_sheet
from torch import Generator, Tensor

from errata import correct
from errata.correct import (
    IEC,
    Correction,
    Corrector,
    CorrectorContext,
    DiffIER,
    EpsilonScaling,
    Forecast,
    Langevin,
    Lookahead,
    Plan,
    Refresh,
    SecondOrder,
    StepView,
    fit_forecast,
    wrap,
)
from errata.correct.scheduler_hook import Evaluations
from errata.correct.traits import traits_of
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, PlanError
from errata.runtime.schedule import CacheSchedule

Build = Callable[[str], Any]
Artifact = Callable[[str], DeployedPipeline]
LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
GUIDED = (
    "ldm labels vq",
    "ldm labels split",
    "ldm context kl",
    "sd 1",
    "sd 2",
    "sdxl",
    "sd upscale",
    "sd latent upscale",
    "audioldm2",
)
NAMES = ("ddim", "ldm unconditional", *GUIDED)
METHODS: tuple[Any, ...] = (
    IEC(),
    IEC(iterations=2, tolerance=0.0, guard=False),
    Forecast(order=1),
    Lookahead(),
    Refresh(),
    DiffIER(max_iterations=2, threshold=0.0),
    Langevin(),
    SecondOrder(),
    EpsilonScaling(scale=1.02),
)
# A method that joins `correct/methods/` is run here without being named.
METHODS += tuple(
    kind()
    for name, kind in correct.METHODS.items()
    if kind.__module__.startswith("errata.")
    and name not in {"FittedForecast", "Hindsight", "Sheet", *(type(method).__name__ for method in METHODS)}
)
NEED_A_CACHE = (Forecast, Lookahead, Refresh)
# Of the largest latent. Sums of a convolution depend on the batch size: 2e-6 at most was measured.
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2


def latents(small: Any, run: Callable[..., Any], **options: Any) -> Tensor:
    """Of two samples; decoded, they might be snapped to a codebook."""
    seeds = [Generator().manual_seed(index) for index in range(2)]
    output_type = "np" if type(small.pipe).__name__ == "DDIMPipeline" else "latent"
    arguments = {"generator": seeds, "output_type": output_type, **small.inputs, **options}
    return torch.as_tensor(getattr(run(**arguments), small.output)).float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Counting:
    """Counts what a denoiser is asked, in batches of the run's size."""

    def __init__(self, deployed: DeployedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[str, int]] = []
        for kind in ("full", "cached"):
            plain = getattr(deployed.denoiser, kind)

            def counted(x: Tensor, *args: Any, kind: str = kind, plain: Any = plain, **kwargs: Any) -> Any:
                self.rows.append((kind, len(x)))
                return plain(x, *args, **kwargs)

            monkeypatch.setattr(deployed.denoiser, kind, counted)

    def evaluations(self) -> dict[str, float]:
        largest = max(rows for _, rows in self.rows)
        counts: dict[str, float] = {}
        for kind, rows in self.rows:
            counts[kind] = counts.get(kind, 0.0) + rows / largest
        return counts


def expected_extra(method: Any, schedule: CacheSchedule) -> dict[str, float] | None:
    served = len(method.serves(schedule))
    match method:
        case IEC(iterations=count):
            return {"full": float(count * served)}
        case Langevin() | SecondOrder():
            return {"full": float(served)}
        case Lookahead():
            return {"full": float(2 * schedule.calls_per_step)}
        case Refresh():
            return {"full": float(served), "cached": -float(served)}
        case Forecast() | DiffIER() | EpsilonScaling():
            return {}
        case _:
            return None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sd latent upscale"])  # it has no cache
def test_a_forecast_is_fitted_to_its_features(
    name: str, small_pipeline: Build, small_artifact: Artifact
) -> None:
    small, deployed = small_pipeline(name), small_artifact(name)
    plain, every = latents(small, deployed), latents(small, wrap(deployed, Plan(Refresh())))
    fitted = fit_forecast(
        deployed, samples=2, batch_size=2, inputs=lambda batch: small.inputs, progress=False
    )
    served = Forecast().serves(deployed.schedule)
    assert [len(row) for row in fitted.weights] == [
        2 if call in served else 0 for call in range(deployed.schedule.num_steps)
    ]
    found = latents(small, wrap(deployed, Plan(fitted)))
    assert distance(found, plain) > 10 * TOLERANCE
    assert distance(found, every) < 2 * distance(plain, every)  # no extrapolation gone wild


@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_serves_it(
    name: str, small_pipeline: Build, small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, deployed = small_pipeline(name), small_artifact(name)
    schedule, plain = deployed.schedule, latents(small, deployed)
    for method in METHODS:
        if traits_of(method).needs_guidance and name not in GUIDED:
            with pytest.raises(
                PlanError, match="(has no guidance scale; correct with|=1 does not guide; use a scale above)"
            ):
                latents(small, wrap(deployed, Plan(method)))
            continue
        if isinstance(method, NEED_A_CACHE) and not schedule.has_cache:
            with pytest.raises(PlanError, match="cannot correct any step of this artifact: it has no cache"):
                wrap(deployed, Plan(method))
            continue
        corrected = wrap(deployed, Plan(method))
        with monkeypatch.context() as patch:
            counting = Counting(deployed, patch)
            found = latents(small, corrected)
        stats = corrected.stats
        moved = distance(found, plain)
        LOG.info("%s, %s: moved by %.1e", name, method, moved)
        assert torch.isfinite(found).all()
        assert moved > 1e-4, method
        if (extra := expected_extra(method, schedule)) is not None:
            assert stats.extra == pytest.approx(extra), method
        assert {kind: n for kind, n in stats.evaluations.items() if n} == pytest.approx(
            counting.evaluations()
        )
        corrected_at = [each.step for each in stats.steps if each.iterations]
        if isinstance(method, DiffIER):
            kept = [each.notes["kept"] for each in stats.steps if each.iterations]
            assert kept == [pytest.approx((0.81, 0.81))] * len(kept)
        if not isinstance(method, (*NEED_A_CACHE, EpsilonScaling)):
            first_calls = [s for s in method.serves(schedule) if schedule.stream(s) == 0]
            assert corrected_at == first_calls


@pytest.mark.parametrize("name", NAMES)
def test_a_sheet_makes_a_better_network(name: str, small_pipeline: Build, small_artifact: Artifact) -> None:
    """In one doubled batch or two calls, for every kind of prediction: both halves before guidance."""
    small, deployed = small_pipeline(name), small_artifact(name)
    better = deployed.clone()
    better.pipe.unet.denoiser = MappedByHand(better.denoiser)
    expected, plain = latents(small, better), latents(small, deployed)
    found = latents(small, wrap(deployed, Plan(made_up_sheet(deployed))))
    assert distance(found, expected) < TOLERANCE
    assert distance(plain, expected) > 10 * TOLERANCE


@dataclass
class Seen:
    """What `Spy` saw at a step, and what it was told of the next one."""

    prediction: Tensor
    again: Tensor
    ahead: Tensor | None


@dataclass(frozen=True)
class Watch:
    """A method that changes nothing, and evaluates at every step: where it is, and where the next one is."""

    seen: list[Seen] = field(default_factory=list)

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None:
        pass

    def corrector(self, context: CorrectorContext) -> Corrector:
        return Spy(context, self.seen)


class Spy(Corrector):
    def __init__(self, context: CorrectorContext, seen: list[Seen]) -> None:
        super().__init__(context)
        self._seen = seen

    def at_step(self, view: StepView) -> Correction | None:
        schedule = self.context.schedule
        ahead = view.step + schedule.calls_per_step
        again, _ = view.evaluate(view.sample)
        landed = view.preview(view.prediction)
        is_last = ahead == schedule.num_steps
        there = None if is_last else view.evaluate(landed, step=ahead)[0]
        self._seen.append(Seen(view.prediction, again, there))
        return None


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES] + [(name, {"guidance_rescale": 0.7}) for name in ("sd 1", "sd 2", "sdxl")],
)
def test_an_evaluation_is_what_the_pipeline_itself_would_get(
    name: str, options: dict[str, Any], small_pipeline: Build, small_artifact: Artifact
) -> None:
    """All steps are full here, so the next one of the pipeline's own loop says what one ahead should find."""
    small, deployed, watch = small_pipeline(name), small_artifact(name), Watch()
    plan = Plan(watch)  # type: ignore[arg-type]
    latents(small, wrap(deployed, Plan(Refresh()) + plan if deployed.schedule.has_cache else plan), **options)
    errors, others = [], []
    for here, there in zip(watch.seen, watch.seen[1:], strict=False):
        assert here.ahead is not None
        errors += [distance(here.again, here.prediction), distance(here.ahead, there.prediction)]
        others.append(distance(here.prediction, there.prediction))
    LOG.info("%s %s: %.1e, from step to step at least %.1e", name, options, max(errors), min(others))
    assert len(watch.seen) == deployed.schedule.num_steps // deployed.schedule.calls_per_step
    assert max(errors) < TOLERANCE
    assert min(others) > 10 * TOLERANCE


# Guidance in two calls.


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_two_calls_are_corrected_as_one_is(
    method: Any, small_pipeline: Build, small_artifact: Artifact
) -> None:
    small = small_pipeline("ldm labels vq")
    one, two = (wrap(small_artifact(name), Plan(method)) for name in ("ldm labels vq", "ldm labels split"))
    assert two.deployed.schedule.calls_per_step == 2
    expected, found = latents(small, one), latents(small, two)
    plain = distance(latents(small, one.deployed), expected)
    LOG.info("%s: %.1e, not corrected %.1e", method, distance(found, expected), plain)
    assert distance(found, expected) < TOLERANCE
    assert plain > 10 * TOLERANCE
    assert two.stats.extra == pytest.approx({kind: 2 * n for kind, n in one.stats.extra.items()})


@pytest.mark.parametrize("method", [IEC(), Lookahead()], ids=lambda m: type(m).__name__)
def test_features_of_the_two_calls_are_not_exchanged(
    method: Any, small_pipeline: Build, small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they would do to each other, to show that the tolerance sees it."""
    small, corrected = (
        small_pipeline("ldm labels split"),
        wrap(small_artifact("ldm labels split"), Plan(method)),
    )
    right, evaluate = latents(small, corrected), Evaluations.__call__

    def exchanging(self: Evaluations, *args: Any, **kwargs: Any) -> Any:
        prediction, features = evaluate(self, *args, **kwargs)
        return prediction, features[::-1]

    monkeypatch.setattr(Evaluations, "__call__", exchanging)
    assert distance(latents(small, corrected), right) > 10 * TOLERANCE


def test_a_guided_artifact_of_two_calls_says_so_when_it_is_not_guided(
    small_pipeline: Build, small_artifact: Artifact
) -> None:
    corrected = wrap(small_artifact("ldm labels split"), Plan(IEC()))
    small = small_pipeline("ldm labels split")
    with pytest.raises(
        PlanError, match="1 times for one step of the scheduler, 2 were .*; sample with guidance"
    ):
        latents(small, corrected, guidance_scale=1.0)
    with pytest.raises(ArtifactMismatchError, match="and with guidance: 2 calls a step were recorded"):
        latents(small, corrected.deployed, guidance_scale=1.0)


# Half precision.


@pytest.mark.parametrize(
    "method", [IEC(iterations=2, tolerance=0.0), Forecast(order=1)], ids=["iec", "forecast"]
)
@pytest.mark.parametrize("name", ["sd 1", "sdxl", "sd upscale"])
def test_half_precision(name: str, method: Any, small_pipeline: Build, small_artifact: Artifact) -> None:
    """`pipe.to(torch.float16)`: everything but the accumulation is in half precision."""
    small, deployed = small_pipeline(name), small_artifact(name)
    halved = DeployedPipeline.of(copy.deepcopy(deployed.pipe).to(torch.float16))
    assert halved is not None
    corrected, in_half = wrap(deployed, Plan(method)), wrap(halved, Plan(method))
    expected, found = latents(small, corrected), latents(small, in_half)
    # What the correction changes, since half precision alone moves the latents by 0.003 to 0.004.
    change, half_change = expected - latents(small, deployed), found - latents(small, halved)
    LOG.info("%s: %.1e, its change %.1e", name, distance(found, expected), distance(half_change, change))
    assert distance(found, expected) < 0.02
    assert distance(half_change, change) < 0.2  # 0.01 to 0.08 measured; 1 where nothing is corrected
    assert in_half.stats.extra == corrected.stats.extra
    for one, other in zip(in_half.stats.steps, corrected.stats.steps, strict=True):
        for of_half, of_whole in zip(one.residuals, other.residuals, strict=True):
            # The last ones are as small as the rounding; iterates of half precision would move by 0.01.
            assert of_half == pytest.approx(of_whole, rel=0.05, abs=2e-3)
