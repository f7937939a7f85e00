"""A file under its final name is always whole."""

from pathlib import Path

import pytest
import torch

from errata.calibration.recorder import Trajectory
from errata.calibration.shards import StepReader, replace_file, write_shard


def test_a_write_that_stops_halfway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def write_half(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(KeyboardInterrupt):
            replace_file(path, b"something new")
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_a_tensor_without_rows_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "shards").mkdir()
    sample = torch.randn(3, 4, 1, 2, 2).to(dtype)
    trajectory = Trajectory(
        sample=sample,
        timestep=torch.tensor([2.5, 1.5, 0.5]),
        cond={"shared": torch.arange(3.0)[:, None].expand(3, 7), "scalar": torch.tensor([1, 2, 3])},
    )
    shard = write_shard(tmp_path, 0, trajectory, num_samples=4, inputs=None)
    assert shard.is_intact(tmp_path)
    reader = StepReader(tmp_path / shard.file, shard, rows_per_sample=1)
    assert reader.sample(1, 1, 3).dtype == dtype
    assert torch.equal(reader.sample(1, 1, 3), sample[1, 1:3])
    assert reader.timestep(2).item() == 0.5
    cond = reader.cond(1, 1, 3)
    assert torch.equal(cond["shared"], torch.ones(7))
    assert torch.equal(cond["scalar"], torch.tensor(2))
