"""The Langevin corrector against Algorithms 4 and 5 written out, and the distribution that it keeps."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct.corrector import Correction, CorrectorContext, Features, Rows, StepView, take
from errata.correct.methods.langevin import Langevin
from errata.correct.noise_levels import NoiseLevels
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

PRESERVING = NoiseLevels(signal=(0.28, 0.6, 0.8), noise=(0.96, 0.8, 0.6))
EXPLODING = NoiseLevels(signal=(1.0,) * 3, noise=(9.0, 3.0, 0.5), scales_input=True)
VARIANCE = 0.25  # of the data


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting_of(levels: NoiseLevels | None, **changes: Any) -> CorrectorContext:
    return CorrectorContext(
        steps=changes.get("steps", (0, 1)),
        schedule=changes.get("schedule", CacheSchedule.uncached(3)),
        timesteps=(3.0, 2.0, 1.0),
        levels=levels,
    )


def network(x: Tensor, levels: NoiseLevels, step: int) -> Tensor:
    """The best ε for data N(0, VARIANCE), so that the score at call `step` is -x / (a² v + b²)."""
    a, b = levels.signal[step], levels.noise[step]
    return levels.prediction(x, b * x / (a * a * VARIANCE + b * b), step)


class Step:
    """A view of one step of which the plain result is `y`; keeps the evaluations."""

    def __init__(self, y: Tensor, levels: NoiseLevels, step: int, images: list[int], **seen: Any) -> None:
        self.asked: list[tuple[Tensor, int]] = []

        def evaluate(
            samples: Tensor, rows: Rows = None, *, step: int | None = None
        ) -> tuple[Tensor, Features]:
            assert step is not None
            self.asked.append((samples, step))
            return network(take(samples, rows), levels, step), ()

        self.view = StepView(
            step=step,
            kind="cached",
            sample=7 * y,
            prediction=seen.get("prediction", torch.zeros_like(y)),
            features=(),
            is_linear=True,
            is_guided=False,
            preview=lambda prediction: y,
            evaluate=evaluate,
            noise=lambda draw: torch.stack([randn(*y.shape[1:], seed=1000 * i + draw) for i in images]),
        )


def run(method: Langevin, step: Step, levels: NoiseLevels) -> Correction:
    correction = method.corrector(setting_of(levels)).at_step(step.view)
    assert correction is not None
    return correction


def after(correction: Correction) -> Tensor:
    assert correction.prev_sample is not None
    return correction.prev_sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("form", [PRESERVING, EXPLODING])
@pytest.mark.parametrize("step", [0, 1])
def test_it_is_the_papers_algorithm(form: NoiseLevels, kind: str, step: int) -> None:
    levels = NoiseLevels(
        signal=form.signal, noise=form.noise, prediction_type=kind, scales_input=form.scales_input
    )
    method = Langevin(snr=0.2, iterations=3)
    y = randn(2, 1, 4, 4, seed=1)
    seen = Step(y, levels, step, [0, 1])
    correction = run(method, seen, levels)
    # ᾱ over the step after the next call; the clean sample comes after the last.
    alphas_bar = [a * a for a in levels.signal] + [1.0]
    alpha = alphas_bar[step + 1] / alphas_bar[step + 2]
    assert (alpha == 1.0) == form.scales_input
    sigma2 = levels.signal[step + 1] ** 2 * VARIANCE + levels.noise[step + 1] ** 2
    for row in range(2):
        x = y[row]
        for j in range(3):
            z, g = randn(1, 4, 4, seed=1000 * row + j), -x / sigma2
            size = 2 * alpha * (0.2 * math.sqrt(float((z * z).sum() / (g * g).sum()))) ** 2
            moved = x + size * g + math.sqrt(2 * size) * z
            assert correction.residuals[j][1][row] == pytest.approx(float((moved - x).norm()))
            x = moved
        torch.testing.assert_close(after(correction)[row], x, rtol=1e-10, atol=1e-10)
    assert (after(correction) - y).abs().max() > 0.05
    assert [step for _, step in seen.asked] == [step + 1] * 3
    assert torch.equal(seen.asked[0][0], y)


def test_the_prediction_stays_and_the_sample_is_replaced() -> None:
    y, prediction = randn(1, 1, 4, 4, seed=1), randn(1, 1, 4, 4, seed=2)
    correction = run(Langevin(), Step(y, PRESERVING, 0, [0], prediction=prediction), PRESERVING)
    assert correction.prediction is prediction
    assert correction.features is None


@pytest.mark.parametrize("form", [PRESERVING, EXPLODING])
def test_the_distribution_of_the_level_is_kept_and_restored(form: NoiseLevels) -> None:
    """Elements are N(0, s²), s² = a² v + b²: that variance stays, and one that is amiss moves towards it.

    With u the variance over s² and c = α r², an iteration makes u (1 - 2c/u)² + 4c/u of u.
    """
    s2 = form.signal[1] ** 2 * VARIANCE + form.noise[1] ** 2
    c = (form.signal[1] / form.signal[2]) ** 2 * 0.16**2
    right = math.sqrt(s2) * randn(4, 1, 128, 128, seed=1)
    for scale in (1.0, 0.7, 1.4):
        moved = after(run(Langevin(snr=0.16, iterations=5), Step(scale * right, form, 0, [6, 7, 8, 9]), form))
        u = before = scale**2
        for _ in range(5):
            u = u * (1 - 2 * c / u) ** 2 + 4 * c / u
        assert float(moved.var() / s2) == pytest.approx(u, abs=0.03)
        assert abs(u - 1) < 0.02 if scale == 1.0 else abs(u - before) > 0.1


def test_samples_do_not_depend_on_their_neighbours() -> None:
    y = randn(3, 1, 4, 4, seed=1) * torch.tensor([1.0, 5.0, 0.1]).reshape(3, 1, 1, 1)
    together = run(Langevin(iterations=2), Step(y, PRESERVING, 0, [4, 5, 6]), PRESERVING)
    for index in range(3):
        one = slice(index, index + 1)
        alone = run(Langevin(iterations=2), Step(y[one], PRESERVING, 0, [4 + index]), PRESERVING)
        assert torch.equal(after(together)[one], after(alone))


def test_half_precision_is_moved_in_single() -> None:
    y = 500 * randn(1, 4, 16, 16, seed=1).half()
    moved = after(run(Langevin(), Step(y, PRESERVING, 0, [0]), PRESERVING))
    assert moved.dtype == torch.float32
    exact = after(run(Langevin(), Step(y.double(), PRESERVING, 0, [0]), PRESERVING))
    torch.testing.assert_close(moved.double(), exact, rtol=1e-2, atol=1.0)


def test_the_last_step_is_not_served() -> None:
    assert Langevin().serves(CacheSchedule.uniform(5, interval=2, branch=1)) == (0, 1, 2, 3)
    assert Langevin().serves(CacheSchedule.uncached(6, calls_per_step=2)) == (0, 1, 2, 3)


def test_a_start_from_pure_noise_is_served() -> None:
    """Zero terminal SNR: the score is needed at the call after, where there is signal."""
    levels = NoiseLevels(signal=(0.0, 0.6, 0.8), noise=(1.0, 0.8, 0.6), prediction_type="v_prediction")
    Langevin().check(setting_of(levels))


def test_unknown_noise_levels_are_refused() -> None:
    with pytest.raises(PlanError, match="Langevin needs the noise level .* such as IEC"):
        Langevin().check(setting_of(None))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("snr", 0.0, "finite and above 0"),
        ("snr", float("inf"), "finite and above 0"),
        ("snr", "0.16", "finite and above 0"),
        ("iterations", 0, "an integer, 1 or more"),
        ("iterations", True, "an integer, 1 or more"),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        Langevin(**{name: value})
    assert f"Langevin({name}={value!r}): {name} must be {allowed};" in str(caught.value)


def test_json_round_trip() -> None:
    method = Langevin(snr=0.1, iterations=2)
    stored = json.loads(json.dumps(method.to_json()))
    assert stored == {"type": "Langevin", "version": 1, "snr": 0.1, "iterations": 2}
    assert Langevin.from_json(stored) == method
    with pytest.raises(PlanError, match="expected type 'Langevin', got 'IEC'"):
        Langevin.from_json({**stored, "type": "IEC"})
