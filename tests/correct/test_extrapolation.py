import numpy as np
import pytest
import torch
from numpy.polynomial.hermite import hermval

from errata.correct.extrapolation import hermite_weights, newton_weights, weighted_sum

UNEQUAL = [20.0, 13.0, 9.0, 2.0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_repeats_a_polynomial_of_its_order_on_unequal_steps(order: int) -> None:
    positions = UNEQUAL[: order + 1]
    coefficients = np.array([0.7, -1.3, 0.11, -0.02])[: order + 1]
    weights = newton_weights(positions, 24.0)
    read = sum(w * np.polynomial.Polynomial(coefficients)(s) for w, s in zip(weights, positions, strict=True))
    assert read == pytest.approx(np.polynomial.Polynomial(coefficients)(24.0), rel=1e-12)
    beyond = np.polynomial.Polynomial([*coefficients, 0.01])  # one order more is not repeated
    read = sum(w * beyond(s) for w, s in zip(weights, positions, strict=True))
    assert abs(read - beyond(24.0)) > 1e-2


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_hermite_by_numpy_s_polynomials(order: int, sigma: float) -> None:
    """f[s_0..s_k] by the recursive definition of divided differences, H_k by numpy."""
    positions = UNEQUAL[: order + 1]
    values = [1.0, -0.4, 2.2, 0.3][: order + 1]
    differences, column = [values[0]], values
    for k in range(1, order + 1):
        column = [
            (column[i + 1] - column[i]) / (positions[i + k] - positions[i]) for i in range(len(column) - 1)
        ]
        differences.append(column[0])
    u = 23.0 - positions[0]
    scaled = [sigma**k * hermval(sigma * u, [0] * k + [1]) for k in range(order + 1)]
    expected = sum(d * h for d, h in zip(differences, scaled, strict=True))
    weights = hermite_weights(positions, 23.0, sigma=sigma)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(expected, rel=1e-12)


def test_hermite_of_order_1_is_newton_at_one_sigma_and_damps_below() -> None:
    newton = newton_weights(UNEQUAL[:2], 23.0)
    assert hermite_weights(UNEQUAL[:2], 23.0, sigma=0.5**0.5) == pytest.approx(newton)
    damped = hermite_weights(UNEQUAL[:2], 23.0, sigma=0.5)
    assert damped[0] - 1 == pytest.approx((newton[0] - 1) / 2)


def test_a_sum_in_half_precision_is_made_in_single() -> None:
    """40,000 - 2 x 30,000 + 20,016: the partial sums are beyond float16, the result is not."""
    values = [torch.tensor([each], dtype=torch.float16) for each in (40000.0, 30000.0, 20016.0)]
    total = weighted_sum([2.0, -2.0, -1.0], values)
    assert total.dtype == torch.float16
    assert total.item() == -16.0
