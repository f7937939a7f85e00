"""An estimate of a compression: exact where the format is, and without a trace."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DDIMPipeline

from errata import RecipeError, calibration, compress
from errata.calibration import CalibrationSet
from errata.compress.jobs import estimation
from errata.compress.jobs.estimation import estimate


@pytest.fixture(scope="module")
def recorded(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    folder = tmp_path_factory.mktemp("estimation") / "set"
    return calibration.calibrate(tiny_pipeline, folder, num_inference_steps=4, num_samples=6, batch_size=3)


def tensors_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8a8:calibrated_output=false", "deepcache-2"])
def test_bytes_of_tensors_are_exact(
    tiny_pipeline: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path, name: str
) -> None:
    found = compress.estimate(tiny_pipeline, recorded, name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    compress.compress(tiny_pipeline, recorded, name, tmp_path / "out")
    assert found.disk_bytes == tensors_in(tmp_path / "out")
    assert name in found.work


def test_the_pipeline_stays_as_it_was(tiny_pipeline: DDIMPipeline, recorded: CalibrationSet) -> None:
    before = calibration.model_fingerprint(tiny_pipeline.unet)
    estimate(tiny_pipeline, recorded, "w8a8")
    assert calibration.model_fingerprint(tiny_pipeline.unet) == before
    assert tiny_pipeline.unet._forward_pre_hooks == {}


def counted(pipe: DDIMPipeline, recorded: CalibrationSet, name: str, *, samples: int = 64) -> float:
    """Evaluations that a recipe takes."""
    recipe = compress.Recipe.named(name)
    return estimation._Counted(pipe, recorded, recipe, samples, False).evaluations


def test_evaluations_are_counted_stage_by_stage(
    tiny_pipeline: DDIMPipeline, recorded: CalibrationSet
) -> None:
    steps, samples = 4, 6
    observed = estimation.OBSERVED * steps * samples
    mapped = (1 + estimation.SIMULATED) * steps * samples
    drawn = samples * steps * (1 + 2 * estimation.SIMULATED)
    assert counted(tiny_pipeline, recorded, "w8a8:calibrated_output=false") == pytest.approx(observed)
    assert counted(tiny_pipeline, recorded, "w8a8") == pytest.approx(observed + mapped + drawn)
    assert counted(tiny_pipeline, recorded, "deepcache-2") == 0
    fewer = counted(tiny_pipeline, recorded, "w8a8:calibrated_output=false", samples=2)
    assert fewer == pytest.approx(observed / 3)


def test_what_costs_more_is_estimated_higher(tiny_pipeline: DDIMPipeline, recorded: CalibrationSet) -> None:
    names = ("w8a8", "w8a8:bias_correction=true", "w8a8-learned:iterations=50", "w8a8-learned")
    costs = [counted(tiny_pipeline, recorded, name) for name in names]
    assert costs == sorted(costs)
    assert counted(tiny_pipeline, recorded, "w8a8+cachequant-2") > costs[0]


def test_codes_and_ranges_that_are_reused_take_no_time(
    tiny_pipeline: DDIMPipeline, recorded: CalibrationSet
) -> None:
    recipe = compress.Recipe.named("w8a8:calibrated_output=false")
    work = estimation._Counted(tiny_pipeline, recorded, recipe, 64, True)
    assert (work.evaluations, work.choice_seconds) == (0, 0)


def test_too_little_memory_is_refused(
    tiny_pipeline: DDIMPipeline, recorded: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimation, "available_memory", lambda: 1000)
    with pytest.raises(RecipeError, match=r"not enough memory: compressing with w8a8 from 6 samples needs"):
        estimate(tiny_pipeline, recorded, "w8a8").check(error=RecipeError)


def test_too_little_disk_space_is_refused(
    tiny_pipeline: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RecipeError, match=r"not enough disk space in .*; choose another `out`"):
        estimate(tiny_pipeline, recorded, "w8a8", tmp_path / "out").check(error=RecipeError)
