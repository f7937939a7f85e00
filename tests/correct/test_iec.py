from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct import IEC
from errata.correct.corrector import Rows, take
from errata.correct.iec import iterate
from errata.errors import PlanError


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("step_size", 0.0, "in (0, 1]"),
        ("step_size", 1.5, "in (0, 1]"),
        ("step_size", float("nan"), "in (0, 1]"),
        ("step_size", "0.5", "in (0, 1]"),
        ("iterations", 0, "an integer, 1 or more"),
        ("iterations", 1.0, "an integer, 1 or more"),
        ("iterations", True, "an integer, 1 or more"),
        ("tolerance", -1e-9, "finite, 0 or more"),
        ("tolerance", float("inf"), "finite, 0 or more"),
        ("cache_after", "drop", '"replace" or "keep"'),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        IEC(**{name: value})
    assert (
        str(caught.value) == f"IEC({name}={value!r}): {name} must be {allowed}; leave it out for the default"
    )


def test_the_limits_are_allowed() -> None:
    assert IEC(step_size=1.0, iterations=1, tolerance=0.0, cache_after="keep").step_size == 1.0


# Below, the step is y = A x + B ε and the network is ε(y) = J y, so iterates are known in closed form.
A, B, J = 1.02, -0.2, 0.7
X = torch.tensor([[1.0], [-2.0], [0.25]], dtype=torch.float64)


def preview(prediction: Tensor) -> Tensor:
    return A * X + B * prediction


def evaluate(samples: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    return J * take(samples, rows), None


@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0])
def test_converges_to_the_fixed_point_at_the_predicted_rate(step_size: float) -> None:
    """Error after k: (1 - λ + λ B J)^k, Eq. 10 being linear here; the fixed point solves y = A x + B J y."""
    fixed = A * X / (1 - B * J)
    start = preview(J * X) - fixed
    for iterations in (1, 2, 5):
        correction = iterate(
            J * X, preview, evaluate, step_size=step_size, iterations=iterations, tolerance=0.0
        )
        assert correction.prev_sample is not None
        rate = 1 - step_size + step_size * B * J
        torch.testing.assert_close(
            correction.prev_sample - fixed, start * rate**iterations, rtol=1e-9, atol=0
        )
        # The blended prediction leads to the same sample: the step is linear.
        torch.testing.assert_close(preview(correction.prediction), correction.prev_sample, rtol=1e-12, atol=0)


def test_a_linear_step_needs_no_sample_of_its_own() -> None:
    correction = iterate(J * X, preview, evaluate, step_size=0.5, iterations=1, tolerance=0.0, is_linear=True)
    assert correction.prev_sample is None
    assert correction.feature is None


def test_residuals_are_those_of_each_sample() -> None:
    correction = iterate(J * X, preview, evaluate, step_size=0.5, iterations=1, tolerance=0.0)
    [(rows, residuals)] = correction.residuals
    assert rows is None
    first = preview(J * X)
    moved = 0.5 * (preview(J * first) - first)
    torch.testing.assert_close(residuals, moved.abs().flatten(), rtol=1e-12, atol=0)


def test_half_precision_is_accumulated_in_single() -> None:
    """2,048 elements that each move by 40: the sum of squares, 3.3e6, is beyond float16."""
    x = torch.zeros(1, 2048, dtype=torch.float16)
    correction = iterate(
        torch.zeros_like(x),
        lambda prediction: prediction,
        lambda samples, rows: (torch.full_like(x, 40.0), None),
        step_size=1.0,
        iterations=1,
        tolerance=0.0,
    )
    [(_, residuals)] = correction.residuals
    assert correction.prediction.dtype == torch.float16
    assert residuals.dtype == torch.float32
    assert residuals.item() == pytest.approx(40 * 2048**0.5)
