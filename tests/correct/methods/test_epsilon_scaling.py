"""Scaled noise against the division written out for each kind of prediction."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct.corrector import CorrectorContext, Features, Rows, StepView
from errata.correct.methods.epsilon_scaling import EpsilonScaling
from errata.correct.noise_levels import NoiseLevels
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

SIGNAL, NOISE = (0.28, 0.6, 0.96), (0.96, 0.8, 0.28)
X = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EPS = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def levels_of(kind: str = "epsilon") -> NoiseLevels:
    return NoiseLevels(signal=SIGNAL, noise=NOISE, prediction_type=kind)


def setting_of(levels: NoiseLevels | None, schedule: CacheSchedule | None = None) -> CorrectorContext:
    return CorrectorContext(
        steps=(0, 1, 2),
        schedule=schedule or CacheSchedule.uncached(3),
        timesteps=(3.0, 2.0, 1.0),
        levels=levels,
    )


def view_of(prediction: Tensor, step: int, sample: Tensor = X) -> StepView:
    return StepView(
        step=step,
        kind="full",
        sample=sample,
        prediction=prediction,
        features=(),
        is_linear=True,
        is_guided=False,
        preview=refuse,
        evaluate=fail_on_evaluation,
        noise=fail_on_noise,
    )


def refuse(prediction: Tensor) -> Tensor:
    raise AssertionError("takes no look ahead")


def fail_on_noise(draw: int) -> Tensor:
    raise AssertionError("draws no noise")


def fail_on_evaluation(
    samples: Tensor, rows: Rows = None, *, step: int | None = None
) -> tuple[Tensor, Features]:
    raise AssertionError("evaluates nothing")


def scaled(method: EpsilonScaling, kind: str, prediction: Tensor, step: int, sample: Tensor = X) -> Tensor:
    correction = method.corrector(setting_of(levels_of(kind))).at_step(view_of(prediction, step, sample))
    assert correction is not None
    assert correction.prev_sample is None
    return correction.prediction


@pytest.mark.parametrize("step", [0, 1, 2])
def test_each_kind_of_prediction_means_less_noise(step: int) -> None:
    """x = a x_0 + b ε is held, so x_0 and v follow from ε / λ."""
    method = EpsilonScaling(scale=1.25, slope=0.5)
    a, b, factor = SIGNAL[step], NOISE[step], 1.25 + 0.5 * step
    less = EPS / factor
    clean, clean_after = (X - b * EPS) / a, (X - b * less) / a
    cases = {
        "epsilon": (EPS, less),
        "sample": (clean, clean_after),
        "v_prediction": (a * EPS - b * clean, a * less - b * clean_after),
    }
    for kind, (before, expected) in cases.items():
        actual = scaled(method, kind, before, step)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        assert (actual - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_scale_of_one_changes_nothing(kind: str) -> None:
    corrector = EpsilonScaling(scale=1.0).corrector(setting_of(levels_of(kind)))
    assert corrector.at_step(view_of(EPS, 1)) is None


def test_variance_exploding_samples() -> None:
    """Euler's form, where v belongs to the scaled input."""
    sigma = 3.0
    levels = NoiseLevels(signal=(1.0,), noise=(sigma,), prediction_type="v_prediction", scales_input=True)
    setting = CorrectorContext(
        steps=(0,), schedule=CacheSchedule.uncached(1), timesteps=(1.0,), levels=levels
    )
    v_of = lambda eps: (eps - sigma * (X - sigma * eps)) / (1 + sigma**2) ** 0.5  # noqa: E731
    correction = EpsilonScaling(scale=1.25).corrector(setting).at_step(view_of(v_of(EPS), 0))
    assert correction is not None
    torch.testing.assert_close(correction.prediction, v_of(EPS / 1.25), rtol=1e-10, atol=1e-10)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    method = EpsilonScaling(scale=1.1)
    together = scaled(method, "v_prediction", EPS, 1)
    alone = scaled(method, "v_prediction", EPS[1:], 1, X[1:])
    assert torch.equal(together[1:], alone)


def test_half_precision_is_divided_in_single() -> None:
    """The result is rounded once, where ε in float16 would be rounded, divided, and taken times b / a."""
    method, x, clean = EpsilonScaling(scale=1.01), X.half(), EPS.half()
    actual = scaled(method, "sample", clean, 0, x)
    assert actual.dtype == torch.float16
    assert torch.equal(actual, scaled(method, "sample", clean.double(), 0, x.double()).half())


def test_every_step_is_served_and_two_calls_make_one() -> None:
    schedule = CacheSchedule.uncached(6, calls_per_step=2)
    assert EpsilonScaling().serves(schedule) == (0, 1, 2, 3, 4, 5)
    assert EpsilonScaling().serves(CacheSchedule.uniform(4, interval=2, branch=1)) == (0, 1, 2, 3)
    method = EpsilonScaling(scale=1.0, slope=0.1)
    assert [round(method.at(step, schedule), 6) for step in range(6)] == [1.0, 1.0, 1.1, 1.1, 1.2, 1.2]


def test_what_cannot_work_is_refused() -> None:
    EpsilonScaling(scale=1.0, slope=-0.4).check(setting_of(levels_of()))
    with pytest.raises(PlanError, match=r"slope=-0.5\) divides by 0 at step 2; .* use a smaller slope"):
        EpsilonScaling(scale=1.0, slope=-0.5).check(setting_of(levels_of()))
    with pytest.raises(PlanError, match="EpsilonScaling needs the noise level .* such as IEC"):
        EpsilonScaling().check(setting_of(None))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("scale", 0.0, "finite and above 0"),
        ("scale", float("inf"), "finite and above 0"),
        ("scale", "1", "finite and above 0"),
        ("slope", float("nan"), "finite"),
        ("slope", False, "finite"),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        EpsilonScaling(**{name: value})
    assert f"EpsilonScaling({name}={value!r}): {name} must be {allowed};" in str(caught.value)


def test_json_round_trip() -> None:
    method = EpsilonScaling(scale=1.01, slope=-1e-5)
    stored = json.loads(json.dumps(method.to_json()))
    assert stored == {"type": "EpsilonScaling", "version": 1, "scale": 1.01, "slope": -1e-5}
    assert EpsilonScaling.from_json(stored) == method
    with pytest.raises(PlanError, match="unknown key 'lambda'"):
        EpsilonScaling.from_json({**stored, "lambda": 1})
