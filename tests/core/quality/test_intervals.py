import pytest
import torch

from errata.quality.intervals import Measured, mean_estimate


def test_a_mean_has_the_interval_of_its_parts() -> None:
    parts = torch.randn(400) + 3
    measured = Measured.mean(parts)
    assert measured.estimate() == mean_estimate(parts)
    assert measured.value == pytest.approx(float(parts.mean()))


def test_a_constant_shift_of_the_value_moves_the_interval() -> None:
    parts = torch.randn(50).double()
    low, high = mean_estimate(parts).interval.low, mean_estimate(parts).interval.high
    shifted = Measured(float(parts.mean()) + 2, parts=parts).estimate()
    assert (shifted.interval.low, shifted.interval.high) == pytest.approx((low + 2, high + 2))


def test_pairs_cancel_what_they_share() -> None:
    shared = 10 * torch.randn(500).double()
    one, other = Measured.mean(shared + 0.1 * torch.randn(500)), Measured.mean(shared)
    width = one.minus(other).interval.high - one.minus(other).interval.low
    alone = one.estimate().interval.high - one.estimate().interval.low
    assert width < alone / 50
    assert one.minus(one).interval.low == one.minus(one).interval.high == 0


def test_replicates_are_centred_and_pair() -> None:
    noise = torch.randn(2000).double()
    one, other = Measured(5.0, replicates=6 + noise), Measured(4.0, replicates=6.5 + noise)
    interval = one.estimate().interval
    assert (interval.low + interval.high) / 2 == pytest.approx(5, abs=0.15)
    assert interval.high - interval.low == pytest.approx(2 * 1.96, rel=0.1)
    difference = one.minus(other)
    assert difference.value == 1.0
    assert (difference.interval.low, difference.interval.high) == pytest.approx((1, 1))


def test_more_confidence_is_wider() -> None:
    measured = Measured.mean(torch.randn(100))
    usual, careful = measured.estimate().interval, measured.estimate(confidence=0.99).interval
    assert (careful.high - careful.low) / (usual.high - usual.low) == pytest.approx(2.5758 / 1.96, rel=1e-3)


def test_what_does_not_pair_is_refused() -> None:
    parts, replicates = Measured.mean(torch.rand(5)), Measured(1.0, replicates=torch.rand(5).double())
    with pytest.raises(ValueError, match="do not pair"):
        parts.minus(replicates)
    with pytest.raises(ValueError, match="5 and 6 numbers do not pair"):
        parts.minus(Measured.mean(torch.rand(6)))
    with pytest.raises(ValueError, match="either parts or replicates"):
        Measured(1.0)
