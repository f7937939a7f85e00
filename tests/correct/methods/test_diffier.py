"""DiffIER against Algorithm 1 run one sample at a time, and what it forgets."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct.corrector import Correction, CorrectorContext, Features, Rows, StepView
from errata.correct.methods.diffier import DiffIER
from errata.correct.noise_levels import NoiseLevels
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

SIGNAL, NOISE = (0.28, 0.6, 0.96), (0.96, 0.8, 0.28)
STEP = 1


def setting_of(kind: str = "epsilon", *, is_known: bool = True) -> CorrectorContext:
    levels = NoiseLevels(signal=SIGNAL, noise=NOISE, prediction_type=kind) if is_known else None
    return CorrectorContext(
        steps=(0, 1, 2), schedule=CacheSchedule.uncached(3), timesteps=(3.0, 2.0, 1.0), levels=levels
    )


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(images: list[int], shape: tuple[int, ...], draws: list[int] | None = None) -> Any:
    """Fresh noise of each image, told by its number, as `StepView.noise` promises."""

    def noise(draw: int) -> Tensor:
        if draws is not None:
            draws.append(draw)
        return torch.stack([randn(*shape, seed=1000 * image + draw) for image in images])

    return noise


def view_of(sample: Tensor, prediction: Tensor, noise: Callable[[int], Tensor], **changes: Any) -> StepView:
    def fail_on_preview(prediction: Tensor) -> Tensor:
        raise AssertionError("takes no look ahead")

    def refuse(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        raise AssertionError("evaluates nothing")

    return StepView(
        step=STEP,
        kind="cached",
        sample=sample,
        prediction=prediction,
        features=(),
        is_linear=True,
        is_guided=changes.get("is_guided", True),
        preview=fail_on_preview,
        evaluate=refuse,
        noise=noise,
    )


def run(method: DiffIER, view: StepView, kind: str = "epsilon") -> Correction:
    correction = method.corrector(setting_of(kind)).at_step(view)
    assert correction is not None
    return correction


def algorithm_1(eps: Tensor, noise: Callable[[int], Tensor], method: DiffIER) -> tuple[Tensor, list[float]]:
    """One sample `(1, …)`, by autograd: its ε and |L_k - L_{k-1}| of each iteration."""
    changes: list[float] = []
    before = 0.0
    for k in range(method.max_iterations):
        eps = eps.detach().requires_grad_()
        loss = ((eps - noise(k)) ** 2).sum()
        [gradient] = torch.autograd.grad(loss, eps)
        eps = (eps - method.step_size * gradient).detach()
        per_element = loss.item() / eps.numel()
        changes.append(abs(per_element - before))
        before = per_element
        if k > 0 and changes[-1] < method.threshold:
            break
    return eps, changes


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 1e3])
def test_it_is_algorithm_1_on_every_sample(threshold: float) -> None:
    """At 0.1 and 0.02 the samples stop at different iterations; at 1000 all stop at the second."""
    method = DiffIER(threshold=threshold, max_iterations=8)
    shape, images = (3, 16, 16), [4, 5, 6, 7, 8]
    eps = 0.8 * randn(5, *shape, seed=1)
    correction = run(method, view_of(randn(5, *shape, seed=2), eps, noise_of(images, shape)))
    taken = []
    for index, image in enumerate(images):
        expected, changes = algorithm_1(eps[index : index + 1], noise_of([image], shape), method)
        torch.testing.assert_close(correction.prediction[index : index + 1], expected, rtol=1e-12, atol=1e-12)
        assert of_sample(correction, index) == pytest.approx(changes, rel=1e-9)
        torch.testing.assert_close(float(correction.notes["kept"][index]), 0.9 ** len(changes))
        taken.append(len(changes))
    assert (correction.prediction - eps).abs().max() > 0.1
    assert {0.0: {8}, 1e3: {2}}.get(threshold, set(taken)) == set(taken)
    assert len(set(taken)) > 1 or threshold in (0.0, 1e3)


def of_sample(correction: Correction, index: int) -> list[float]:
    """Residuals of one sample, as the stats read them."""
    values = []
    for rows, residuals in correction.residuals:
        if rows is None or rows[index]:
            values.append(float(residuals[index]))
    return values


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_each_kind_of_prediction_is_corrected_in_its_noise(kind: str) -> None:
    levels = setting_of(kind).levels
    assert levels is not None
    shape = (1, 4, 4)
    x, eps = randn(2, *shape, seed=3), 0.5 * randn(2, *shape, seed=4)
    view = view_of(x, levels.prediction(x, eps, STEP), noise_of([1, 2], shape))
    corrected = run(DiffIER(max_iterations=3, threshold=0.0), view, kind)
    plain = run(DiffIER(max_iterations=3, threshold=0.0), view_of(x, eps, noise_of([1, 2], shape)))
    actual = levels.epsilon(x, corrected.prediction, STEP)
    torch.testing.assert_close(actual, plain.prediction, rtol=1e-10, atol=1e-10)
    assert (actual - eps).abs().max() > 0.05


def test_it_descends_on_the_noise_it_sees() -> None:
    """With one noise for all draws the loss falls by (1 - 2η)² a step, and ε nears it at that rate."""
    target, eps = randn(1, 1, 8, 8, seed=5), randn(1, 1, 8, 8, seed=6)
    for count in (1, 3, 8):
        method = DiffIER(max_iterations=count, threshold=0.0)
        correction = run(method, view_of(eps, eps, lambda draw: target))
        expected = (eps - target) * 0.9**count
        torch.testing.assert_close(correction.prediction - target, expected, rtol=1e-10, atol=1e-12)
        assert float(correction.notes["kept"]) == pytest.approx(0.9**count)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    method = DiffIER(threshold=0.05)
    shape = (3, 16, 16)
    x, eps = randn(4, *shape, seed=7), 0.8 * randn(4, *shape, seed=8)
    together = run(method, view_of(x, eps, noise_of([0, 1, 2, 3], shape)))
    for index in range(4):
        one = slice(index, index + 1)
        alone = run(method, view_of(x[one], eps[one], noise_of([index], shape)))
        assert torch.equal(together.prediction[one], alone.prediction)
        assert torch.equal(together.notes["kept"][one], alone.notes["kept"])
        assert of_sample(together, index) == of_sample(alone, 0)


def test_every_iteration_draws_once_and_stops_when_all_have() -> None:
    shape, draws = (1, 4, 4), list[int]()
    eps = randn(2, *shape, seed=9)
    run(DiffIER(max_iterations=5, threshold=0.0), view_of(eps, eps, noise_of([1, 2], shape, draws)))
    assert draws == [0, 1, 2, 3, 4]
    draws.clear()
    run(DiffIER(max_iterations=5, threshold=1e3), view_of(eps, eps, noise_of([1, 2], shape, draws)))
    assert draws == [0, 1]


def test_half_precision_is_accumulated_in_single() -> None:
    """Differences of 300: their squares, 9e4, are beyond float16."""
    prediction = torch.full((1, 1, 4, 4), 300.0, dtype=torch.float16)
    view = view_of(prediction, prediction, lambda draw: torch.zeros_like(prediction))
    correction = run(DiffIER(max_iterations=1), view)
    assert correction.prediction.dtype == torch.float16
    torch.testing.assert_close(correction.prediction, torch.full_like(prediction, 270.0))
    [(rows, residuals)] = correction.residuals
    assert rows is None
    assert residuals.item() == pytest.approx(9e4)


def test_an_unguided_step_is_refused() -> None:
    eps = randn(1, 1, 2, 2, seed=1)
    view = view_of(eps, eps, noise_of([0], (1, 2, 2)), is_guided=False)
    with pytest.raises(PlanError, match="step 1 was not guided; use a guidance_scale above 1, or .* IEC"):
        DiffIER().corrector(setting_of()).at_step(view)


def test_unknown_noise_levels_are_refused() -> None:
    with pytest.raises(PlanError, match="DiffIER needs the noise level .* such as IEC"):
        DiffIER().check(setting_of(is_known=False))


def test_every_step_is_served() -> None:
    assert DiffIER().serves(CacheSchedule.uniform(4, interval=2, branch=1)) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("step_size", 0.0, "in (0, 0.5]"),
        ("step_size", 0.6, "in (0, 0.5]"),
        ("threshold", -1e-9, "finite, 0 or more"),
        ("threshold", float("inf"), "finite, 0 or more"),
        ("max_iterations", 0, "an integer, 1 or more"),
        ("max_iterations", 2.0, "an integer, 1 or more"),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        DiffIER(**{name: value})
    assert f"DiffIER({name}={value!r}): {name} must be {allowed};" in str(caught.value)


def test_json_round_trip() -> None:
    method = DiffIER(step_size=0.1, threshold=0.0, max_iterations=3)
    stored = json.loads(json.dumps(method.to_json()))
    assert stored == {
        "type": "DiffIER", "version": 1, "step_size": 0.1, "threshold": 0.0, "max_iterations": 3
    }  # fmt: skip
    assert DiffIER.from_json(stored) == method
    with pytest.raises(PlanError, match="version 2 is not supported"):
        DiffIER.from_json({**stored, "version": 2})
