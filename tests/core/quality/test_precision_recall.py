import pytest
import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.precision_recall import precision_and_recall


def draw(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_a_set_covers_itself_and_a_far_one_nothing() -> None:
    precise, recalled = precision_and_recall(draw(30), draw(30))
    assert bool(precise.all())
    assert bool(recalled.all())
    precise, recalled = precision_and_recall(draw(30) + 100, draw(40, seed=1))
    assert not bool(precise.any())
    assert not bool(recalled.any())


def test_a_mode_that_is_missing_costs_recall_and_a_new_one_precision() -> None:
    mode, other = draw(40), draw(40, seed=1) + 50
    precise, recalled = precision_and_recall(mode, torch.cat([mode, other]))
    assert bool(precise.all())
    assert recalled.tolist() == [True] * 40 + [False] * 40
    precise, recalled = precision_and_recall(torch.cat([mode, other]), mode)
    assert precise.tolist() == [True] * 40 + [False] * 40
    assert bool(recalled.all())


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_a_loop_over_balls_gives_the_same(block: int, neighbours: int) -> None:
    features, real = draw(25), draw(31, seed=1) * 1.2 + 0.4

    def inside(points: Tensor, centres: Tensor) -> list[bool]:
        radii = [
            sorted(float((a - b).double().norm()) for j, b in enumerate(centres) if j != i)[neighbours - 1]
            for i, a in enumerate(centres)
        ]
        return [
            any(float((p - c).double().norm()) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]

    precise, recalled = precision_and_recall(features, real, neighbours=neighbours, block=block)
    assert precise.tolist() == inside(features, real)
    assert recalled.tolist() == inside(real, features)
    assert 0 < float(precise.double().mean()) < 1


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ReportError, match="of 3 images against 9 with neighbours=3; use more images than"):
        precision_and_recall(draw(3), draw(9))
    with pytest.raises(ReportError, match="of 3 images against 2 with neighbours=2"):
        precision_and_recall(draw(3), draw(2), neighbours=2)
    with pytest.raises(ReportError, match="neighbours=0, block=1000"):
        precision_and_recall(draw(9), draw(9), neighbours=0)
    with pytest.raises(ValueError, match="features have 3 dimensions, the reference has 2"):
        precision_and_recall(draw(9), draw(9)[:, :2])
