import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct import IEC
from errata.correct.corrector import Features, Rows, take
from errata.correct.methods.iec import iterate
from errata.errors import PlanError

SIZES = "in (0, 1], one number or one for each iteration"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("step_size", 0.0, SIZES),
        ("step_size", 1.5, SIZES),
        ("step_size", (0.5, 0.25), SIZES),  # for one iteration
        ("step_size", float("nan"), SIZES),
        ("step_size", "0.5", SIZES),
        ("iterations", 0, "an integer, 1 or more"),
        ("iterations", 1.0, "an integer, 1 or more"),
        ("iterations", True, "an integer, 1 or more"),
        ("tolerance", -1e-9, "finite, 0 or more"),
        ("tolerance", float("inf"), "finite, 0 or more"),
        ("cache_after", "drop", '"replace" or "keep"'),
        ("stopping", "paper", '"per_sample" or "official"'),
        ("guard", 1, "true or false"),
    ],
)
def test_values_out_of_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        IEC(**{name: value})
    assert (
        str(caught.value) == f"IEC({name}={value!r}): {name} must be {allowed}; leave it out for the default"
    )


@pytest.mark.parametrize("method", [IEC(), IEC.official("latent")])
def test_json_is_plain_and_comes_back(method: IEC) -> None:
    """Sizes are a list in it, so that what was written equals what is read."""
    value = method.to_json()
    assert json.loads(json.dumps(value)) == value
    assert IEC.from_json(value) == method
    assert IEC.from_json(value).step_size == method.step_size


def test_one_iteration_never_stops_early() -> None:
    """The tolerance is asked from the second iteration on, however large it is."""
    for iterations in (1, 3):
        correction = iterate(J * X, preview, evaluate, IEC(iterations=iterations, tolerance=1e9))
        assert len(correction.residuals) == 1
        assert correction.prev_sample is not None
        assert not correction.prev_sample.equal(preview(J * X))


def test_the_limits_are_allowed() -> None:
    assert IEC(step_size=1.0, iterations=1, tolerance=0.0, cache_after="keep").step_size == 1.0


# Below, the step is y = A x + B ε and the network is ε(y) = J y, so iterates are known in closed form.
A, B, J = 1.02, -0.2, 0.7
X = torch.tensor([[1.0], [-2.0], [0.25]], dtype=torch.float64)


def preview(prediction: Tensor) -> Tensor:
    return A * X + B * prediction


def evaluate(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
    return J * take(samples, rows), ()


@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0])
def test_converges_to_the_fixed_point_at_the_predicted_rate(step_size: float) -> None:
    """Error after k: (1 - λ + λ B J)^k, Eq. 10 being linear here; the fixed point solves y = A x + B J y."""
    fixed = A * X / (1 - B * J)
    start = preview(J * X) - fixed
    for iterations in (1, 2, 5):
        choices = IEC(step_size=step_size, iterations=iterations, tolerance=0.0)
        correction = iterate(J * X, preview, evaluate, choices)
        assert correction.prev_sample is not None
        rate = 1 - step_size + step_size * B * J
        torch.testing.assert_close(
            correction.prev_sample - fixed, start * rate**iterations, rtol=1e-9, atol=0
        )
        # The blended prediction leads to the same sample: the step is linear.
        torch.testing.assert_close(preview(correction.prediction), correction.prev_sample, rtol=1e-12, atol=0)


def test_a_linear_step_needs_no_sample_of_its_own() -> None:
    correction = iterate(J * X, preview, evaluate, IEC(), is_linear=True)
    assert correction.prev_sample is None
    assert correction.features is None


def test_residuals_are_those_of_each_sample() -> None:
    correction = iterate(J * X, preview, evaluate, IEC())
    [(rows, residuals)] = correction.residuals
    assert rows is None
    first = preview(J * X)
    moved = 0.5 * (preview(J * first) - first)
    torch.testing.assert_close(residuals, moved.abs().flatten(), rtol=1e-12, atol=0)


def test_half_precision_is_accumulated_in_single() -> None:
    """2,048 elements that each move by 40: the sum of squares, 3.3e6, is beyond float16."""
    x = torch.zeros(1, 2048, dtype=torch.float16)

    def forty(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        return torch.full_like(x, 40.0), ()

    correction = iterate(
        torch.zeros_like(x), lambda prediction: prediction, forty, IEC(step_size=1.0, tolerance=0.0)
    )
    [(_, residuals)] = correction.residuals
    assert correction.prediction.dtype == torch.float16
    assert residuals.dtype == torch.float32
    assert residuals.item() == pytest.approx(40 * 2048**0.5)


def test_a_size_for_each_iteration() -> None:
    """From y^(0) the iterates are affine; here 1, then 0.5."""
    correction = iterate(J * X, preview, evaluate, IEC(step_size=(1.0, 0.5), iterations=2, tolerance=0.0))
    y = preview(J * X)
    for size in (1.0, 0.5):
        y = y + size * (preview(J * y) - y)
    assert correction.prev_sample is not None
    torch.testing.assert_close(correction.prev_sample, y, rtol=1e-12, atol=0)


def test_a_sample_that_moves_further_keeps_what_it_had() -> None:
    """y = x + b ε with ε(y) = y contracts for |b| < 1 and diverges beyond."""
    slope = torch.tensor([[0.5], [-1.8], [2.5]], dtype=torch.float64)

    def ahead(prediction: Tensor) -> Tensor:
        return X + slope * prediction

    def itself(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        return take(samples, rows), ()

    choices = IEC(step_size=1.0, iterations=4, tolerance=0.0)
    guarded = iterate(X, ahead, itself, choices)
    free = iterate(X, ahead, itself, replace(choices, guard=False))
    assert guarded.diverged is not None
    assert guarded.diverged.tolist() == [False, True, True]
    assert guarded.notes["guarded"].tolist() == [0, 1, 1]
    assert free.notes["guarded"].tolist() == [0, 0, 0]
    assert [len(values) for _, values in guarded.residuals] == [3, 3, 1, 1]
    assert guarded.prev_sample is not None
    assert free.prev_sample is not None
    torch.testing.assert_close(guarded.prev_sample[0], free.prev_sample[0], rtol=0, atol=0)
    once = ahead(ahead(X))  # the iterate before the move that was longer
    torch.testing.assert_close(guarded.prev_sample[1:], once[1:], rtol=1e-12, atol=0)
    assert (free.prev_sample[1:] - once[1:]).abs().min() > 1


def test_what_goes_up_and_down_below_the_first_residual_has_not_diverged() -> None:
    moves = iter([8.0, 1.0, 2.0, 4.0])

    def stumbling(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        return take(samples, rows) + next(moves), ()

    choices = IEC(step_size=1.0, iterations=4, tolerance=0.0)
    correction = iterate(X[:1], lambda prediction: prediction, stumbling, choices)
    assert correction.diverged is not None
    assert correction.diverged.tolist() == [False]
    assert correction.notes["guarded"].tolist() == [1]  # stopped all the same, and counted
    assert [values.tolist() for _, values in correction.residuals] == [[8.0], [1.0], [2.0]]
    assert correction.prev_sample is not None
    assert correction.prev_sample.item() == 1.0 + 8.0 + 1.0


def test_another_kind_of_official_is_refused() -> None:
    with pytest.raises(PlanError, match=r"IEC\.official\('image'\): kind must be \"pixel\" or \"latent\""):
        IEC.official("image")  # type: ignore[arg-type]


def test_the_paper_s_choices_are_the_defaults() -> None:
    assert IEC.paper() == IEC() == IEC(step_size=0.5, iterations=1, tolerance=1e-5)


def test_the_authors_code() -> None:
    """λ = 0.5^k; a batch that has converged as a whole throws its last evaluation away, feature apart."""
    assert IEC.official().step_size == (0.5,)
    assert IEC.official("latent").step_size == (1.0, 0.5)
    features = (torch.ones(1),)

    def nearly(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        assert rows is None  # nobody leaves the batch
        return samples * torch.tensor([[1.0 + 1e-7], [1.0], [1.0]]), features

    def kept(prediction: Tensor) -> Tensor:
        return prediction

    converged = iterate(X, kept, nearly, IEC.official())
    assert converged.prev_sample is not None
    assert converged.prev_sample.equal(X)
    assert converged.features is features
    moved = iterate(X, kept, nearly, replace(IEC.official(), tolerance=1e-9))
    assert moved.prev_sample is not None
    assert not moved.prev_sample.equal(X)
