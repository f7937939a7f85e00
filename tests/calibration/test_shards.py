"""What a shard holds comes back as it was."""

from pathlib import Path

import pytest
import torch

from errata.calibration.document import RULES
from errata.calibration.recorder import Trajectory
from errata.calibration.shards import StepReader, write_shard
from errata.journal import Journal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_a_tensor_without_rows_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    sample = torch.randn(3, 4, 1, 2, 2).to(dtype)
    trajectory = Trajectory(
        sample=sample,
        timestep=torch.tensor([2.5, 1.5, 0.5]),
        cond={"shared": torch.arange(3.0)[:, None].expand(3, 7), "scalar": torch.tensor([1, 2, 3])},
    )
    with Journal(tmp_path, {"seed": 0}, RULES) as journal:
        shard = write_shard(journal, 0, trajectory, num_samples=4, inputs=None)
    assert shard.is_intact(tmp_path)
    reader = StepReader(tmp_path / shard.file, shard, rows_per_sample=1)
    assert reader.sample(1, 1, 3).dtype == dtype
    assert torch.equal(reader.sample(1, 1, 3), sample[1, 1:3])
    assert reader.timestep(2).item() == 0.5
    cond = reader.cond(1, 1, 3)
    assert torch.equal(cond["shared"], torch.ones(7))
    assert torch.equal(cond["scalar"], torch.tensor(2))
