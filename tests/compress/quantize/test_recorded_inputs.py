from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress.quantize.recorded_inputs import MixedSteps, choose_inputs, spill_inputs
from errata.compress.rounding.row_store import RowStore


@pytest.mark.parametrize(("count", "shares"), [(2, {1}), (5, {1}), (12, {2, 3}), (1000, {7})])
def test_steps_have_equal_shares(count: int, shares: set[int]) -> None:
    chosen = choose_inputs(num_steps=5, num_samples=7, count=count, seed=0)
    steps = Counter({step: len(set(samples)) for step, samples in chosen})
    assert sum(steps.values()) == min(count, 35)
    assert set(steps.values()) == shares
    assert len(steps) == min(count, 5)
    assert chosen == choose_inputs(num_steps=5, num_samples=7, count=count, seed=0)


def test_few_inputs_are_spread_over_the_steps() -> None:
    chosen = choose_inputs(num_steps=100, num_samples=3, count=4, seed=0)
    assert [step for step, _ in chosen] == [0, 25, 50, 75]


def test_rows_are_the_recorded_ones(tiny_calibration: CalibrationSet, tmp_path: Path) -> None:
    with RowStore(tmp_path) as store:
        spill_inputs(tiny_calibration, store, count=12, seed=3)
        assert len(store) == 12
        rows = store.read(range(12))
    chosen = choose_inputs(num_steps=6, num_samples=8, count=12, seed=3)
    expected = []
    for step, samples in chosen:
        everything = torch.cat([record.sample for record in tiny_calibration.batches(step)])
        expected.append(everything[samples])
    assert torch.equal(rows["sample"], torch.cat(expected))
    assert rows["step"].tolist() == [step for step, samples in chosen for _ in samples]


def test_rows_of_guidance_are_independent(network: Callable[[str], Any], tmp_path: Path) -> None:
    case = network("sd")
    times = (501.0, 301.0)

    def batches(step: int, *, limit: int, batch_size: int) -> list[Record]:
        assert batch_size == 1
        return [
            Record(sample=case.x, timestep=torch.tensor(times[step]), cond=case.cond, step=step)
            for _ in range(limit)
        ]

    recorded: Any = SimpleNamespace(num_steps=2, num_samples=3, rows_per_sample=2, batches=batches)
    with RowStore(tmp_path) as store:
        spill_inputs(recorded, store, count=4, seed=0)
        batch = store.read([0, 5])  # the first row at step 0, the second row at step 1
    with torch.no_grad():
        found = MixedSteps(times)(case.unet, batch["step"], batch)
    for row, time in enumerate(times):
        torch.testing.assert_close(found[row], case.own_forward(time=time)[row], atol=1e-5, rtol=1e-4)
