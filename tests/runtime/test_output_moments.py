"""The fit of one call: what it finds, what it shrinks, and whose errors it trusts."""

import pytest
import torch
from torch import Tensor

from errata.errors import ErrataError
from errata.runtime.output_moments import GROUPS, OutputMoments

MATRIX = torch.tensor([[1.05, 0.02, 0.0], [-0.03, 0.9, 0.01], [0.0, 0.04, 1.1]])
BIAS = torch.tensor([0.02, -0.05, 0.01])
IMAGES = 64


def predictions(seed: int, images: int = IMAGES) -> Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def mapped(prediction: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", MATRIX, prediction) + BIAS[:, None, None]


def filled(prediction: Tensor, target: Tensor, *, batch_size: int = 16) -> OutputMoments:
    moments = OutputMoments(2, 3)
    for start in range(0, len(prediction), batch_size):
        batch = slice(start, start + batch_size)
        images = torch.arange(len(prediction))[batch]
        moments.add(1, prediction[batch], target[batch], images)
    return moments


def test_a_map_is_found() -> None:
    prediction = predictions(0)
    target = mapped(prediction) + 0.05 * predictions(1)
    matrix, bias = filled(prediction, target).map_of(1)
    assert torch.allclose(matrix, MATRIX, atol=4e-3)
    assert torch.allclose(bias, BIAS, atol=4e-3)
    assert float((matrix - torch.eye(3)).abs().max()) > 10 * 4e-3


def test_the_bias_alone_is_the_mean_error() -> None:
    prediction = predictions(0)
    matrix, bias = filled(prediction, prediction + BIAS[:, None, None]).map_of(1, bias_only=True)
    assert torch.equal(matrix, torch.eye(3))
    assert torch.allclose(bias, BIAS, atol=1e-5)


def test_what_is_only_sampling_error_vanishes() -> None:
    """The target differs by noise without a mean: nearly all that a plain fit finds is shrunk away."""
    prediction = predictions(0)
    moments = filled(prediction, prediction + 0.3 * predictions(1))
    matrix, bias = moments.map_of(1)
    found = torch.cat([(matrix - torch.eye(3)).flatten(), bias])
    plain = 0.3 / (IMAGES * 64) ** 0.5  # the standard error of each
    assert float(found.square().mean().sqrt()) < plain
    big_bias = filled(prediction, prediction + 0.3 * predictions(1) + 0.1).map_of(1)[1]
    assert torch.allclose(big_bias, torch.full((3,), 0.1), atol=0.02)


def test_a_few_images_with_large_errors_do_not_decide() -> None:
    prediction = predictions(0)
    target = prediction + BIAS[:, None, None] + 0.01 * predictions(1)
    target[:3] += 5 * predictions(2)[:3] + 2.0
    _, bias = filled(prediction, target).map_of(1, bias_only=True)
    unweighted = (target - prediction).mean(dim=(0, 2, 3))
    assert torch.allclose(bias, BIAS, atol=5e-3)
    assert float((unweighted - BIAS).abs().max()) > 10 * 5e-3


def test_batches_of_any_size_add_up_nearly_alike() -> None:
    prediction = predictions(0)
    target = mapped(prediction) + 0.05 * predictions(1)
    ones = [filled(prediction, target, batch_size=size).map_of(1)[1] for size in (1, 16, 64)]
    assert torch.allclose(ones[0], ones[2], atol=3e-3)
    assert torch.allclose(ones[1], ones[2], atol=3e-3)


def test_a_call_that_was_not_seen_is_left_alone() -> None:
    moments = filled(predictions(0), mapped(predictions(0)))
    assert moments.seen() == (1,)
    maps = moments.maps()
    assert maps.is_identity == (True, False)
    assert torch.equal(maps.matrix[1], moments.map_of(1)[0])


def test_too_few_images_leave_a_call_alone() -> None:
    """Three images are three groups, whose scatter says nothing."""
    prediction = predictions(0, images=3)
    matrix, bias = filled(prediction, prediction + 1).map_of(1)
    assert torch.equal(matrix, torch.eye(3))
    assert not bias.any()


def test_where_artifact_and_teacher_agree_nothing_is_changed() -> None:
    matrix, bias = filled(predictions(0), predictions(0)).map_of(1)
    assert torch.equal(matrix, torch.eye(3))
    assert not bias.any()


def test_channels_that_are_copies_of_each_other_are_no_obstacle() -> None:
    prediction = predictions(0)
    prediction[:, 2] = prediction[:, 1]
    matrix, bias = filled(prediction, prediction + BIAS[:, None, None]).map_of(1)
    assert bool(matrix.isfinite().all())
    assert torch.allclose(bias, BIAS, atol=1e-4)


@pytest.mark.parametrize("whose", ["artifact's", "teacher's"])
def test_a_prediction_that_is_not_finite_is_named(whose: str) -> None:
    prediction, target = predictions(0), predictions(1)
    (prediction if whose == "artifact's" else target)[5, 1, 2, 3] = torch.nan
    with pytest.raises(ErrataError, match=f"call 1: the {whose} prediction is not finite"):
        filled(prediction, target)


def test_memory_does_not_grow_with_the_images() -> None:
    few, many = (filled(predictions(0, n), predictions(1, n)).state() for n in (GROUPS, 40 * GROUPS))
    assert {name: value.shape for name, value in few.items()} == {
        name: value.shape for name, value in many.items()
    }


@pytest.mark.parametrize("half", [1, 3])
def test_a_restored_state_goes_on_to_the_same_bytes(half: int) -> None:
    prediction, target = predictions(0), mapped(predictions(0)) + predictions(1)
    whole, broken = filled(prediction, target), filled(prediction[: 16 * half], target[: 16 * half])
    resumed = OutputMoments(2, 3)
    resumed.restore(broken.state())
    for start in range(16 * half, IMAGES, 16):
        batch = slice(start, start + 16)
        resumed.add(1, prediction[batch], target[batch], torch.arange(IMAGES)[batch])
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value)
