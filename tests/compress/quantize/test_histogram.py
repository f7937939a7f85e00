import pytest
import torch

from errata.compress.quantize.histogram import BINS, edges, histogram


def test_every_value_lies_between_the_borders_of_its_bin() -> None:
    values = torch.cat([torch.randn(2000), torch.randn(2000) * 1e6, torch.randn(2000) * 1e-6])
    borders = edges()
    for value in values.tolist():
        (place,) = histogram(torch.tensor([value])).nonzero().flatten().tolist()
        # Of a negative bin the upper border is outside, of a positive one too, seen from zero.
        nearer, further = sorted((abs(borders[place]), abs(borders[place + 1])))
        assert nearer <= abs(value) < further
        assert further <= nearer * (1 + 1 / 64)
        assert (borders[place] + borders[place + 1]) * value > 0


def test_borders_ascend_and_meet_at_zero() -> None:
    borders = edges()
    assert borders.shape == (BINS + 1,)
    assert bool((borders.diff() > 0).all())
    assert borders[BINS // 2] == 0
    assert torch.equal(borders, -borders.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_add_up_to_the_whole(dtype: torch.dtype) -> None:
    x = torch.randn(3000).to(dtype)
    parts = sum((histogram(part) for part in x.split(700)), torch.zeros(BINS, dtype=torch.int64))
    assert torch.equal(parts, histogram(x))
    assert int(parts.sum()) == 3000
    assert torch.equal(histogram(-x), histogram(x).flip(0))


def test_what_has_no_bin_goes_into_the_nearest() -> None:
    for value, place in ((1e38, BINS - 1), (-1e38, 0), (1e-38, BINS // 2), (0.0, BINS // 2)):
        assert histogram(torch.tensor([value])).nonzero().flatten().tolist() == [place]
