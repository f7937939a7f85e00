import numpy as np
import pytest
import torch
from numpy.polynomial.hermite import hermval

from errata.correct.extrapolation import (
    Differences,
    combined,
    divided_differences,
    hermite_basis,
    newton_basis,
)

UNEQUAL = [20.0, 13.0, 9.0, 2.0]


def numbers(values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_repeats_a_polynomial_of_its_order_on_unequal_steps(order: int) -> None:
    positions = UNEQUAL[: order + 1]
    coefficients = [0.7, -1.3, 0.11, -0.02][: order + 1]
    for polynomial, is_repeated in (
        (np.polynomial.Polynomial(coefficients), True),
        (np.polynomial.Polynomial([*coefficients, 0.01]), False),
    ):
        differences = divided_differences(positions, numbers([polynomial(s) for s in positions]))
        read = combined(newton_basis(positions, 24.0), differences).item()
        assert (read == pytest.approx(polynomial(24.0), rel=1e-12)) == is_repeated


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_hermite_by_numpy_s_polynomials(order: int, sigma: float) -> None:
    u = 23.0 - UNEQUAL[0]
    scaled = [sigma**k * hermval(sigma * u, [0] * k + [1]) for k in range(order + 1)]
    assert hermite_basis(UNEQUAL[: order + 1], 23.0, sigma=sigma) == pytest.approx(scaled, rel=1e-12)


def test_hermite_of_order_1_is_newton_at_one_sigma_and_damps_below() -> None:
    newton = newton_basis(UNEQUAL[:2], 23.0)
    assert hermite_basis(UNEQUAL[:2], 23.0, sigma=0.5**0.5) == pytest.approx(newton)
    assert hermite_basis(UNEQUAL[:2], 23.0, sigma=0.5)[1] == pytest.approx(newton[1] / 2)


def test_half_precision_is_worked_out_in_single() -> None:
    """40,000 and -40,000 differ by more than float16 holds."""
    values = [torch.tensor([each], dtype=torch.float16) for each in (40000.0, -40000.0)]
    differences = divided_differences([10.0, 0.0], values)
    assert differences[1].dtype == torch.float32
    assert combined(newton_basis([10.0, 0.0], 7.0), differences).item() == 16000.0


def test_differences_are_made_anew_for_another_value_only() -> None:
    known = list(zip([10, 5], numbers([3.0, 1.0]), strict=True))
    remembered = Differences()
    _, first = remembered.of(known)
    assert remembered.of(list(known))[1] is first
    replaced = [(10, torch.tensor(4.0)), known[1]]
    assert remembered.of(replaced)[1][1].item() == pytest.approx(0.6)
