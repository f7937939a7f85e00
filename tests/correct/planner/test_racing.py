"""Which candidates are sampled no further, and when a search is over."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from errata.correct.planner.halving import (
    Trial,
    is_better_so_far,
    is_decided,
    is_precise,
    is_promising,
    looks,
    undecided,
)
from errata.correct.planner.metrics import AgreementMetric
from errata.quality.intervals import mean_estimate

METRIC = AgreementMetric(cast(Any, None), reference="zero")


class Known:
    """A trial whose values are known."""

    def __init__(self, values: Tensor, overhead: float = 0.0) -> None:
        self.kept, self.samples, self.overhead = values[:, None], len(values), overhead


def known(values: Tensor, overhead: float = 0.0) -> Trial:
    return cast(Trial, Known(values, overhead))


@pytest.fixture
def noise() -> Tensor:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values - values.mean(dim=1, keepdim=True)


def test_looks_come_before_the_rounds() -> None:
    assert looks([128, 256, 512], 16) == [16, 32, 64, 128, 256, 512]
    assert looks([512], 128) == [128, 256, 512]
    assert looks([20], 16) == [20]
    assert looks([128, 512], None) == [128, 512]


def test_the_beaten_are_dropped_and_ties_stay(noise: Tensor) -> None:
    none, best = known(5 + noise[0]), known(2 + noise[0])
    tie = known(2.01 + noise[0] + 0.5 * noise[1])  # may be better, as far as is known
    beaten = known(2.5 + noise[0] + 0.1 * noise[1])
    assert undecided([best, tie, beaten], none, METRIC) == [best, tie]
    assert not is_decided([best, tie], none, METRIC)
    assert is_decided([best], none, METRIC)


def test_what_can_be_better_by_next_to_nothing_is_dropped_unless_it_is_cheaper(noise: Tensor) -> None:
    none, best = known(5 + noise[0]), known(2 + noise[0], overhead=0.1)
    # 0.01 worse, give or take 0.03, where the gain is 3
    like = 2.01 + noise[0] + 0.05 * noise[1] / noise[1].std()
    assert undecided([best, known(like, overhead=0.1)], none, METRIC) == [best]
    cheaper = known(like, overhead=0.0)
    assert undecided([best, cheaper], none, METRIC) == [best, cheaper]


def test_no_correction_ends_a_search_that_nothing_wins(noise: Tensor) -> None:
    none = known(2 + noise[0])
    worse = [known(2.5 + noise[0]), known(3 + noise[0] + 0.1 * noise[1])]
    assert undecided(worse, none, METRIC) == []
    assert is_decided([], none, METRIC)
    unclear = known(1.99 + noise[0] + noise[1])
    assert undecided([unclear], none, METRIC) == [unclear]
    assert not is_decided([unclear], none, METRIC)


def test_only_the_images_that_both_have_are_compared(noise: Tensor) -> None:
    none, best = known(torch.cat([5 + noise[0], torch.zeros(64).double()])), known(2 + noise[0])
    assert undecided([best], none, METRIC) == [best]
    assert is_decided([best], none, METRIC)


def test_a_mean_is_precise_within_a_tenth(noise: Tensor) -> None:
    unit = noise[0] / noise[0].std() * 8 / 1.96  # half an interval is 1
    assert is_precise(mean_estimate(unit + 11))
    assert is_precise(mean_estimate(unit - 11))
    assert not is_precise(mean_estimate(unit + 9))


def test_what_is_no_better_on_half_of_the_images_is_dropped(noise: Tensor) -> None:
    none = known(2 + noise[0])
    better = known(1.99 + noise[0] + noise[1])  # give or take 0.2, as the other one
    worse = known(2.01 + noise[0] + noise[2])
    for samples, left in ((None, [better, worse]), (129, [better, worse]), (128, [better]), (64, [better])):
        assert undecided([better, worse], none, METRIC, samples=samples) == left
    # With fewer images than intervals need, half of them say nothing.
    few = none.kept[:8, 0]
    assert is_better_so_far(known(few + 1), known(few), METRIC, samples=8)
    assert not is_better_so_far(known(few.repeat(2) + 1), known(few.repeat(2)), METRIC, samples=16)


def test_a_gain_of_less_than_half_an_interval_is_not_promising(noise: Tensor) -> None:
    none, unit = known(2 + noise[0]), noise[1] / noise[1].std() * 8 / 1.96  # half an interval is 1
    assert is_promising(known(2 - 0.51 + noise[0] + unit), none, METRIC)
    assert not is_promising(known(2 - 0.49 + noise[0] + unit), none, METRIC)
    assert not is_promising(known(2 + 0.51 + noise[0] + unit), none, METRIC)
    assert not is_promising(none, none, METRIC)
