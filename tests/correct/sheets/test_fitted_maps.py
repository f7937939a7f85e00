"""The maps of a run's calls: a sheet's own numbers, or interpolated over the noise level."""

import math

import pytest
import torch

from errata.correct.noise_levels import NoiseLevels
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.runtime.schedule import CacheSchedule

PREDICTION = torch.ones(1, 1, 1, 1)


def levels(*values: float, calls_per_step: int = 1) -> CallLevels:
    return CallLevels(values=values, are_known=True, calls_per_step=calls_per_step)


def maps_of(rows: list[tuple[int, int, float]]) -> FittedMaps:
    """Rows of kind, call and bias, of one channel; the factor is 1 + bias."""
    kinds, calls, biases = zip(*rows, strict=True)
    bias = torch.tensor(biases)[:, None]
    return FittedMaps(
        call=torch.tensor(calls),
        kind=torch.tensor(kinds, dtype=torch.uint8),
        matrix=1 + bias[:, :, None],
        bias=bias,
    )


def applied(
    maps: FittedMaps,
    fitted: CallLevels,
    wanted: CallLevels,
    kind: str = "full",
    steps: list[int] | None = None,
) -> list[float]:
    """Half of what the map adds to a prediction of 1, at every call of the run: the bias in use."""
    calls = range(len(wanted.values))
    output_map = maps.output_map(
        fitted, wanted, steps=list(calls) if steps is None else steps, has_cache=True
    )
    return [(float(output_map(PREDICTION, call, kind)) - 1) / 2 for call in calls]  # type: ignore[arg-type]


def test_equal_calls_get_their_own_numbers() -> None:
    run = levels(2.0, 1.0, 1.0, 0.0)  # a repeated level, as of PNDM
    maps = maps_of([(0, 0, 0.5), (0, 1, 0.25), (0, 2, 0.125), (0, 3, 1.0)])
    assert applied(maps, run, run) == [0.5, 0.25, 0.125, 1.0]


def test_other_levels_are_interpolated_and_not_extrapolated() -> None:
    maps = maps_of([(0, 0, 0.5), (0, 1, 0.25), (0, 2, 1.0)])
    found = applied(maps, levels(2.0, 1.0, -1.0), levels(3.0, 1.5, 0.0, -1.0, -2.0))
    assert found == pytest.approx([0.5, 0.375, 0.625, 1.0, 1.0])


def test_kinds_do_not_mix() -> None:
    """The fit saw full calls at 0 and 2, a cached one at 1: each serves all calls of its kind."""
    run = levels(2.0, 1.0, 0.0)
    maps = maps_of([(0, 0, 0.5), (0, 2, 0.25), (1, 1, 8.0)])
    assert applied(maps, run, run) == pytest.approx([0.5, 0.375, 0.25])
    assert applied(maps, run, run, "cached") == [8.0, 8.0, 8.0]


def test_a_kind_that_was_never_seen_stays_as_it_is() -> None:
    run = levels(2.0, 1.0)
    assert applied(maps_of([(0, 0, 0.5), (0, 1, 0.25)]), run, run, "cached") == [0.0, 0.0]


def test_only_the_chosen_steps_are_mapped() -> None:
    run = levels(2.0, 1.0, 0.0)
    maps = maps_of([(0, 0, 0.5), (0, 1, 0.25), (0, 2, 1.0)])
    assert applied(maps, run, run, steps=[1]) == [0.0, 0.25, 0.0]


def test_streams_do_not_mix() -> None:
    """Guidance in two calls: the calls of a step have one level, and numbers of their own."""
    fitted = levels(2.0, 2.0, 0.0, 0.0, calls_per_step=2)
    maps = maps_of([(0, 0, 0.5), (0, 1, 4.0), (0, 2, 0.25), (0, 3, 8.0)])
    wanted = levels(2.0, 2.0, 1.0, 1.0, 0.0, 0.0, calls_per_step=2)
    assert applied(maps, fitted, wanted) == pytest.approx([0.5, 4.0, 0.375, 6.0, 0.25, 8.0])


def test_levels_are_log_noise_to_signal_where_they_are_known() -> None:
    schedule, timesteps = CacheSchedule.uncached(2), (900.0, 20.0)
    known = CallLevels.of(NoiseLevels(signal=(0.6, 0.8), noise=(0.8, 0.6)), timesteps, schedule)
    assert known.values == pytest.approx((math.log(4 / 3), math.log(3 / 4)))
    zero_terminal = NoiseLevels(signal=(0.0, 0.8), noise=(1.0, 0.6), prediction_type="v_prediction")
    assert CallLevels.of(zero_terminal, timesteps, schedule).values[0] == 20.0
    unknown = CallLevels.of(None, timesteps, schedule)
    assert (unknown.values, unknown.are_known) == (timesteps, False)
