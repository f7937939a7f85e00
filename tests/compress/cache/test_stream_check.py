"""Guidance that takes two calls in a part of the sampler steps only."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.calibration import Record
from errata.compress.cache.cache_features import check_regular_guidance
from errata.errors import RecipeError


class Calls:
    """What a calibration set says of these calls: a timestep, an input and a condition each."""

    def __init__(self, *calls: tuple[int, int, int], calls_per_step: int = 1) -> None:
        self.timesteps = tuple(time for time, _, _ in calls)
        self.calls_per_step = calls_per_step
        self._calls = calls

    def batches(self, step: int, *, limit: int) -> Iterator[Record]:
        assert limit == 1
        time, sample, label = self._calls[step]
        cond: dict[str, Tensor] = {"class_labels": torch.tensor([label]), "size": torch.ones(2)}
        sample_of_call = torch.full((1, 1, 2, 2), float(sample))
        yield Record(sample=sample_of_call, timestep=torch.tensor(time), cond=cond, step=step)


@pytest.mark.parametrize(
    "calls",
    [
        Calls((9, 1, 0), (5, 2, 0), (5, 3, 0), (1, 4, 0)),  # a sampler that comes back
        Calls((9, 1, 0), (5, 2, 1), (5, 3, 2), (1, 4, 3)),  # and a condition that changes all the time
        Calls((9, 1, 0), (5, 1, 1), (1, 1, 2)),
        Calls((9, 1, 0), (9, 1, 1), (5, 2, 0), (5, 2, 1), calls_per_step=2),
    ],
)
def test_calls_that_a_schedule_keeps_apart(calls: Any) -> None:
    check_regular_guidance(calls)


def test_guidance_at_the_end_of_a_run_alone() -> None:
    calls: Any = Calls((9, 1, 1), (5, 2, 0), (5, 2, 1), (1, 3, 0), (1, 3, 1))
    message = (
        "calls 1 and 2 evaluate the same input under two conditions, .* a cache would mix their features"
    )
    with pytest.raises(RecipeError, match=message):
        check_regular_guidance(calls)
