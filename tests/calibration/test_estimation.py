"""An estimate of a calibration: exact where the format is, and without a trace."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from errata import CalibrationError, calibration, estimates, memory
from errata.calibration import estimation
from errata.calibration.first_calls import first_calls
from errata.calibration.shards import shard_bytes
from errata.estimates import stored_size

Guided = Callable[..., Any]
SIZE: dict[str, Any] = {"num_inference_steps": 12, "num_samples": 5, "batch_size": 3}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_size_of_a_safetensors_file_is_known_before_it_is_made(metadata: dict[str, str] | None) -> None:
    tensors = {
        "b.weight": torch.zeros(3, 70),
        "a": torch.zeros(2, 1, 5, dtype=torch.int8),
        "long": torch.zeros(7, dtype=torch.int64),
        "half": torch.zeros(1000, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "flags": torch.zeros(9, dtype=torch.bool),
    }
    described = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    found = shard_bytes(described, metadata=metadata)
    assert found == len(safetensors.torch.save(tensors, metadata=metadata))


def test_bytes_on_disk_are_exact(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    found = calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    calibration.calibrate(tiny_pipeline, tmp_path / "set", **SIZE)
    assert found.disk_bytes == stored_size(tmp_path / "set")
    assert (found.num_samples, found.batch_size, found.num_calls) == (5, 3, 12)


# diffusers 0.42 hands tensors to numpy 2 in a way that torch 2.13 does not serve yet
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_bytes_are_exact_with_prompts_guidance_and_any_scheduler(
    guided_pipeline: Guided, tmp_path: Path, kind: Callable[[], Any]
) -> None:
    pipe = guided_pipeline(kind())
    options: dict[str, Any] = {**SIZE, "prompts": ["a", "bb", "ccc", "d", "e"], "guidance_scale": 3.0}
    found = calibration.estimate(pipe, tmp_path / "set", **options)
    recorded = calibration.calibrate(pipe, tmp_path / "set", **options)
    assert found.num_calls == recorded.num_steps
    assert found.disk_bytes == stored_size(tmp_path / "set")


def test_bytes_are_exact_with_inputs_of_which_one_is_drawn(guided_pipeline: Guided, tmp_path: Path) -> None:
    drawn: list[int] = []

    def mappings() -> Any:
        for number, labels in enumerate(([1, 2, 3], [1, 2])):
            drawn.append(number)
            yield {"class_labels": torch.tensor(labels)}

    pipe = guided_pipeline()
    found = calibration.estimate(pipe, tmp_path / "set", inputs=mappings(), **SIZE)
    assert drawn == [0]
    calibration.calibrate(pipe, tmp_path / "set", inputs=mappings(), **SIZE)
    assert found.disk_bytes == stored_size(tmp_path / "set")


def test_nothing_is_written_and_the_pipeline_stays_as_it_was(
    tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    before, state = dict(vars(tiny_pipeline)), torch.random.get_rng_state()
    calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    assert list(tmp_path.iterdir()) == []
    assert vars(tiny_pipeline) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny_pipeline.unet._forward_pre_hooks == {}


def test_few_calls_are_made(tiny_pipeline: DDIMPipeline) -> None:
    rows: list[int] = []
    handle = tiny_pipeline.unet.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    try:
        found = calibration.estimate(tiny_pipeline, num_inference_steps=1000, num_samples=64, batch_size=4)
    finally:
        handle.remove()
    assert sorted(set(rows)) == [1, 4]
    assert len(rows) <= 16
    assert found.call_samples == 4
    assert found.seconds == pytest.approx(1000 * 16 * found.call_seconds, rel=0.5)


def test_finished_batches_take_no_time_again(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    whole = calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    (tmp_path / "set" / "shards").mkdir(parents=True)
    (tmp_path / "set" / "shards" / "00000.safetensors").touch()
    rest = calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    assert rest.finished == 1
    assert rest.disk_bytes < whole.disk_bytes
    assert "1 of 2 batches are recorded already" in rest.notes


def with_memory(monkeypatch: pytest.MonkeyPatch, *, available: int, per_sample: int) -> None:
    """Pretend that so much is available, and that a sample takes so much."""
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    monkeypatch.setattr(estimation, "available_memory", lambda: available)
    once = 10 * per_sample  # whatever the number of samples
    monkeypatch.setattr(memory.MemoryMeter, "mapped", 0)
    rows: list[int] = []

    def counted(pipe: Any, meter: Any, *, seeds: Any, **options: Any) -> Any:
        rows.append(len(seeds))
        monkeypatch.setattr(memory.MemoryMeter, "growth", lambda _: once + per_sample * rows[-1])
        return first_calls(pipe, meter, seeds=seeds, **options)

    monkeypatch.setattr(estimation, "first_calls", counted)


def test_a_batch_that_was_not_asked_for_is_halved_until_it_fits(
    tiny_pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, available=20_000_000, per_sample=500_000)  # 10 + 30 samples
    found = calibration.estimate(tiny_pipeline, num_inference_steps=4, num_samples=100)
    assert found.batch_size == 16
    assert found.notes[0].endswith("halved until it fits into memory")
    found.check(error=CalibrationError)


def test_a_batch_that_was_asked_for_and_does_not_fit_is_refused(
    tiny_pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, available=20_000_000, per_sample=500_000)
    found = calibration.estimate(tiny_pipeline, num_inference_steps=4, num_samples=100, batch_size=64)
    with pytest.raises(
        CalibrationError, match=r"not enough memory: .* needs 37\.\d MB more, and 20 MB are .*`batch_size`"
    ):
        found.check(error=CalibrationError)


def test_what_grows_once_does_not_count_for_every_sample(
    tiny_pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, available=20_000_000, per_sample=500_000)
    found = calibration.estimate(tiny_pipeline, num_inference_steps=40, num_samples=100, batch_size=28)
    found.check(error=CalibrationError)
    assert found.call_samples == 28


def test_disk_space_that_does_not_suffice_is_refused(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    found = calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    with pytest.raises(CalibrationError, match=r"not enough disk space in .* lower `num_samples`, or choose"):
        found.check(error=CalibrationError)
    assert estimates.disk_need(tmp_path, 999, way_out="").fits


def test_what_calibrate_would_refuse_is_refused(
    tiny_pipeline: DDIMPipeline, guided_pipeline: Guided, tmp_path: Path
) -> None:
    calibration.calibrate(tiny_pipeline, tmp_path / "set", **SIZE)
    with pytest.raises(CalibrationError, match="holds a finished calibration"):
        calibration.estimate(tiny_pipeline, tmp_path / "set", **SIZE)
    with pytest.raises(CalibrationError, match="`num_samples` is 0"):
        calibration.estimate(tiny_pipeline, **{**SIZE, "num_samples": 0})
    with pytest.raises(CalibrationError, match="`prompts` has 1 entries, 5 are needed"):
        calibration.estimate(guided_pipeline(), **SIZE, prompts=["a"])
