"""What whole images decide: the rounding of the weights, and the schedule of a cache."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata import calibration, compress
from errata.calibration import CalibrationSet
from errata.calibration.arguments import ARGUMENTS
from errata.compress.cache.dps import search_schedule
from errata.compress.jobs import work
from errata.compress.quantize.simulation import quantize_weights
from errata.errors import CalibrationError
from errata.runtime.schedule import CacheSchedule

STEPS = 8


@pytest.fixture(scope="module")
def recorded(digits: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    out = tmp_path_factory.mktemp("digits") / "set"
    return calibration.calibrate(digits, out, num_inference_steps=STEPS, num_samples=8, batch_size=8)


RECIPE = "w4a8-learned:iterations=1,samples=8,calibrated_output=false"


@pytest.mark.parametrize("is_bad", [True, False])
def test_rounding_that_harms_images_is_not_kept(
    is_bad: bool,
    digits: DDIMPipeline,
    recorded: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In place of rounding that was learned, codes that are one off; or the same, only a little better."""

    def learned(
        unet: Any, given: Any, scheme: Any, table: dict[str, Tensor], *rest: Any, **options: Any
    ) -> Any:
        codes = {name: value for name, value in table.items() if name.endswith("conv2.codes")}
        return {name: (value + 1).clamp(-7, 7) if is_bad else value for name, value in codes.items()}

    monkeypatch.setattr(work, "learn_rounding", learned)
    compression = compress.compress(digits, recorded, RECIPE, tmp_path / "out").compression
    nearest = quantize_weights(digits.unet, compression.scheme)
    for name, codes in nearest.items():
        assert torch.equal(compression.table[name], codes)
    told = compression.choices["rounding"]
    assert told.startswith("nearest; with nearest in place of learned" if is_bad else "learned; with nearest")
    assert compress.load(tmp_path / "out").compression.choices == compression.choices
    assert ("rounding: nearest" in caplog.text) is is_bad
    again = compress.compress(
        digits, recorded, RECIPE, tmp_path / "again", reuse=compress.load(tmp_path / "out")
    )
    assert again.compression.choices == compression.choices


def test_a_schedule_that_harms_images_is_not_kept(
    digits: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(*arguments: Any) -> CacheSchedule:
        found = search_schedule(*arguments)
        return CacheSchedule(num_steps=STEPS, full_steps=(0, 1), branch=found.branch)

    monkeypatch.setattr(work, "search_schedule", searched)
    compression = compress.compress(digits, recorded, "cachequant-4", tmp_path / "out").compression
    assert compression.schedule.full_steps == (0, 4)
    assert compression.choices["cache schedule"].startswith("uniform; with uniform in place of searched")
    # The correction is that of the schedule that was chosen.
    monkeypatch.undo()
    plain = compress.compress(digits, recorded, "cachequant-4:search=uniform", tmp_path / "uniform")
    for name in ("cache.gain", "cache.shift"):
        assert torch.equal(compression.table[name], plain.compression.table[name])
    assert plain.compression.choices == {}


def test_a_schedule_that_is_as_good_is_kept(
    digits: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(*arguments: Any) -> CacheSchedule:
        return CacheSchedule(num_steps=STEPS, full_steps=(0, 3), branch=search_schedule(*arguments).branch)

    monkeypatch.setattr(work, "search_schedule", searched)
    compression = compress.compress(digits, recorded, "cachequant-4", tmp_path / "out").compression
    told = compression.choices["cache schedule"]
    assert compression.schedule.full_steps == ((0, 3) if told.startswith("searched") else (0, 4))


def test_too_few_trajectories_judge_nothing(
    digits: DDIMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = calibration.calibrate(digits, tmp_path / "set", num_inference_steps=4, num_samples=1, batch_size=1)
    compression = compress.compress(digits, few, "cachequant-2", tmp_path / "out").compression
    assert compression.choices == {}
    assert ("has 1 of the 4 trajectories that a comparison takes at least" in caplog.text) is (
        compression.schedule.full_steps != (0, 2)
    )


def test_altered_arguments_are_refused_before_any_work(
    digits: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(recorded.path, tmp_path / "set"))
    (copied / ARGUMENTS).write_text('{"inputs":null,"prompts":["a house"]}\n')
    with pytest.raises(CalibrationError, match="was altered"):
        compress.compress(digits, calibration.load(copied), "w8a8", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
