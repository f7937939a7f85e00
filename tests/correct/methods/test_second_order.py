"""The averaged step against Heun's method written out, an exact solution, and its own limits."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct.corrector import CorrectorContext, Features, Rows, StepView, take
from errata.correct.methods.second_order import SecondOrder
from errata.correct.noise_levels import NoiseLevels
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

KINDS = ("epsilon", "v_prediction", "sample")
VARIANCE = 0.25  # of the data, in the linear denoiser's closed form


def levels_on_arc(steps: int, kind: str = "epsilon") -> NoiseLevels:
    """a = cos φ, b = sin φ, φ in equal steps: a smooth schedule that neither starts nor ends at a pole."""
    angles = [1.4 - 1.2 * i / (steps - 1) for i in range(steps)]
    return NoiseLevels(
        signal=tuple(map(math.cos, angles)), noise=tuple(map(math.sin, angles)), prediction_type=kind
    )


def best_epsilon(x: Tensor, a: float, b: float) -> Tensor:
    """E[ε | x] for data N(0, VARIANCE): linear in x."""
    return b * x / (a * a * VARIANCE + b * b)


def setting_of(levels: NoiseLevels | None, **changes: Any) -> CorrectorContext:
    total = 8 if levels is None else len(levels.signal)
    schedule = changes.pop("schedule", CacheSchedule.uncached(total))
    timesteps = changes.pop("timesteps", tuple(float(total - i) for i in range(total)))
    steps = changes.pop("steps", tuple(range(total - 1)))
    return CorrectorContext(steps=steps, schedule=schedule, timesteps=timesteps, levels=levels, **changes)


class Network:
    """E[ε | x], bent by `bend`, in the scheduler's terms; its feature is 2x; `asked` are the steps."""

    def __init__(self, levels: NoiseLevels, *, bend: float = 0.0) -> None:
        self.levels, self.bend = levels, bend
        self.asked: list[int] = []

    def epsilon(self, x: Tensor, step: int) -> Tensor:
        eps = best_epsilon(x, self.levels.signal[step], self.levels.noise[step])
        return eps + self.bend * torch.sin(3 * x + step)

    def predict(self, x: Tensor, step: int) -> Tensor:
        return self.levels.prediction(x, self.epsilon(x, step), step)

    def view(self, x: Tensor, step: int) -> StepView:
        def evaluate(
            samples: Tensor, rows: Rows = None, *, step: int | None = None
        ) -> tuple[Tensor, Features]:
            assert step is not None
            self.asked.append(step)
            return self.predict(take(samples, rows), step), (2 * samples,)

        def preview(prediction: Tensor) -> Tensor:
            return self.levels.jump(x, prediction, step, step + 1)

        return StepView(
            step=step,
            kind="full",
            sample=x,
            prediction=self.predict(x, step),
            features=(2 * x,),
            is_linear=True,
            is_guided=False,
            preview=preview,
            evaluate=evaluate,
            noise=refuse,
        )


def refuse(draw: int) -> Tensor:
    raise AssertionError("draws no noise")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_heuns_step(kind: str) -> None:
    """Written out per element, in x / a over σ = b / a, for a network that is not linear."""
    levels = levels_on_arc(8, kind)
    network = Network(levels, bend=0.3)
    x = noise(2, 1, 4, 4)
    corrector = SecondOrder().corrector(setting_of(levels))
    for step in range(7):
        correction = corrector.at_step(network.view(x, step))
        assert correction is not None
        actual = levels.jump(x, correction.prediction, step, step + 1)
        a, b = levels.signal[step], levels.noise[step]
        a_next, b_next = levels.signal[step + 1], levels.noise[step + 1]
        h = b_next / a_next - b / a
        slope = network.epsilon(x, step)
        euler = a_next * (x / a + h * slope)
        expected = a_next * (x / a + h * 0.5 * (slope + network.epsilon(euler, step + 1)))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        assert (actual - euler).abs().max() > 1e-3
        x = actual
    assert network.asked == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_changes_nothing(kind: str) -> None:
    levels = levels_on_arc(8, kind)
    view = Network(levels, bend=0.3).view(noise(2, 1, 4, 4), 3)
    correction = SecondOrder(weight=0).corrector(setting_of(levels)).at_step(view)
    assert correction is not None
    assert torch.equal(correction.prediction, view.prediction)
    assert correction.residuals[0][1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_the_square_of_the_step(kind: str) -> None:
    """Against the exact flow of linear data: x / sqrt(a² v + b²) stays as it is."""

    def error(steps: int, *, corrected: bool) -> float:
        levels = levels_on_arc(steps, kind)
        network = Network(levels)
        corrector = SecondOrder().corrector(setting_of(levels))
        x = start = noise(4, 1, 2, 2)
        for step in range(steps - 1):
            view = network.view(x, step)
            correction = corrector.at_step(view)
            assert correction is not None
            x = levels.jump(x, correction.prediction if corrected else view.prediction, step, step + 1)
        size = [math.sqrt(a * a * VARIANCE + b * b) for a, b in zip(levels.signal, levels.noise, strict=True)]
        exact = start * size[-1] / size[0]
        return float((x - exact).abs().max() / exact.abs().max())

    for steps in (33, 65):  # 32 and 64 intervals
        doubled = 2 * steps - 1
        assert error(steps, corrected=False) / error(doubled, corrected=False) == pytest.approx(2, rel=0.1)
        assert error(steps, corrected=True) / error(doubled, corrected=True) == pytest.approx(4, rel=0.15)
    assert error(65, corrected=True) < 0.1 * error(65, corrected=False)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    levels = levels_on_arc(8)
    corrector = SecondOrder().corrector(setting_of(levels))
    x = noise(3, 1, 4, 4)
    together = corrector.at_step(Network(levels, bend=0.3).view(x, 2))
    alone = corrector.at_step(Network(levels, bend=0.3).view(x[1:2], 2))
    assert together is not None
    assert alone is not None
    assert torch.equal(together.prediction[1:2], alone.prediction)
    assert torch.equal(together.residuals[0][1][1:2], alone.residuals[0][1])


def test_the_cache_keeps_its_feature_or_takes_that_of_the_end_of_the_step() -> None:
    levels = levels_on_arc(8)
    view = Network(levels).view(noise(2, 1, 4, 4), 2)
    keep = SecondOrder().corrector(setting_of(levels)).at_step(view)
    replace = SecondOrder(cache_after="replace").corrector(setting_of(levels)).at_step(view)
    assert keep is not None
    assert keep.features is None
    assert replace is not None
    assert replace.features is not None
    torch.testing.assert_close(replace.features[0], 2 * view.preview(view.prediction), rtol=0, atol=0)


def test_the_last_step_and_cached_ones_are_not_served() -> None:
    assert SecondOrder().serves(CacheSchedule.uncached(4)) == (0, 1, 2)
    assert SecondOrder().serves(CacheSchedule.uniform(7, interval=3, branch=1)) == (0, 3)
    two_calls = CacheSchedule.uncached(6, calls_per_step=2)
    assert SecondOrder().serves(two_calls) == (0, 1, 2, 3)


def test_with_guidance_in_two_calls_the_next_step_is_two_calls_on() -> None:
    arc = levels_on_arc(4)
    levels = NoiseLevels(
        signal=tuple(a for a in arc.signal for _ in range(2)),
        noise=tuple(b for b in arc.noise for _ in range(2)),
    )
    setting = setting_of(
        levels,
        schedule=CacheSchedule.uncached(8, calls_per_step=2),
        timesteps=(4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0),
        steps=(0, 1, 2, 3),
    )
    SecondOrder().check(setting)
    network = Network(levels)
    SecondOrder().corrector(setting).at_step(network.view(noise(1, 1, 2, 2), 2))
    assert network.asked == [4]


def test_half_precision_is_averaged_in_single() -> None:
    """The result is rounded once; ε' in float16 would be rounded, and the prediction that means it again."""
    levels = levels_on_arc(8, "sample")
    half = Network(levels).view(noise(2, 1, 4, 4).half(), 1)
    double = dataclasses.replace(
        half,
        sample=half.sample.double(),
        prediction=half.prediction.double(),
        preview=lambda prediction: half.preview(half.prediction).double(),
    )
    corrector = SecondOrder().corrector(setting_of(levels))
    rounded, exact = corrector.at_step(half), corrector.at_step(double)
    assert rounded is not None
    assert exact is not None
    assert rounded.prediction.dtype == torch.float16
    assert torch.equal(rounded.prediction, exact.prediction.half())


def test_a_sampler_that_repeats_timesteps_is_refused_where_it_does() -> None:
    """As Heun's table does; steps 0 and 2 move in time, step 1 does not."""
    levels = levels_on_arc(5)
    timesteps = (9.0, 6.0, 6.0, 3.0, 3.0)
    SecondOrder().check(setting_of(levels, timesteps=timesteps, steps=(0, 2)))
    with pytest.raises(
        PlanError, match="step 1 at timestep 6 is followed by step 2 at 6: .* with DDIM or Euler"
    ):
        SecondOrder().check(setting_of(levels, timesteps=timesteps, steps=(0, 1, 2)))


def test_unknown_noise_levels_are_refused() -> None:
    with pytest.raises(PlanError, match="SecondOrder needs the noise level .* such as IEC"):
        SecondOrder().check(setting_of(None))
    pure = NoiseLevels(signal=(0.0, 0.6), noise=(1.0, 0.8), prediction_type="v_prediction")
    with pytest.raises(
        PlanError, match="SecondOrder works on the noise in a sample, but step 0 is nothing but"
    ):
        SecondOrder().check(setting_of(pure))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("weight", -0.1, "in [0, 1]"),
        ("weight", 1.1, "in [0, 1]"),
        ("weight", float("nan"), "in [0, 1]"),
        ("weight", True, "in [0, 1]"),
        ("cache_after", "drop", '"replace" or "keep"'),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        SecondOrder(**{name: value})
    assert f"SecondOrder({name}={value!r}): {name} must be {allowed}" in str(caught.value)


def test_json_round_trip() -> None:
    method = SecondOrder(weight=0.25, cache_after="replace")
    stored = json.loads(json.dumps(method.to_json()))
    assert stored == {"type": "SecondOrder", "version": 1, "weight": 0.25, "cache_after": "replace"}
    assert SecondOrder.from_json(stored) == method
    with pytest.raises(PlanError, match="has no key 'weight'"):
        SecondOrder.from_json({"type": "SecondOrder", "version": 1, "cache_after": "keep"})
