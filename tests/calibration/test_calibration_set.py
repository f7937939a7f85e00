"""What was recorded is read back in order, a step at a time, and only if it is whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from errata import CalibrationError, calibration, canonical_json
from errata.calibration.calibration_set import CalibrationSet, Record


@pytest.fixture(scope="module")
def plain(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """Seven unconditional samples in shards of 3, 3 and 1; four steps."""
    out = tmp_path_factory.mktemp("plain") / "set"
    return calibration.collect(tiny_pipeline, out, num_inference_steps=4, num_samples=7, batch_size=3, seed=2)


@pytest.fixture
def guided(guided_pipeline: Callable[..., Any], tmp_path: Path) -> CalibrationSet:
    """Five guided samples in shards of 3 and 2; three steps."""
    return calibration.collect(
        guided_pipeline(),
        tmp_path / "guided",
        num_inference_steps=3,
        num_samples=5,
        batch_size=3,
        prompts=list("abcde"),
        guidance_scale=2.0,
    )


@pytest.fixture
def copied(plain: CalibrationSet, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(plain.path, tmp_path / "copy"))


def test_loading_gives_what_collecting_gave(plain: CalibrationSet, tiny_pipeline: DDIMPipeline) -> None:
    again = calibration.load(str(plain.path))
    again.verify()
    assert again.path == plain.path
    assert again.num_steps == again.num_inference_steps == 4
    assert again.timesteps == (750, 500, 250, 0)
    assert (again.num_samples, again.rows_per_sample, again.seed) == (7, 1, 2)
    assert (again.sample_shape, again.cond_names, again.guidance_scale) == ((1, 8, 8), (), None)
    assert (again.pipeline_class, again.unet_class) == ("DDIMPipeline", "UNet2DModel")
    assert again.scheduler_class == "DDIMScheduler"
    assert again.scheduler_config["clip_sample"] is False
    assert again.fingerprint == calibration.model_fingerprint(tiny_pipeline.unet)
    assert again.versions["torch"] == torch.__version__
    assert repr(again).endswith("7 samples, 4 steps)")


def test_the_files_say_what_the_documentation_says(plain: CalibrationSet) -> None:
    names = sorted(str(path.relative_to(plain.path)) for path in plain.path.rglob("*") if path.is_file())
    assert names == ["calibration.json", *(f"shards/0000{i}.safetensors" for i in range(3))]
    tensors = load_file(plain.path / "shards" / "00000.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "sample": (4, 3, 1, 8, 8),
        "timestep": (4,),
    }
    content = json.loads((plain.path / "calibration.json").read_text())
    assert content["format"] == "errata-calibration/1"
    assert content["shards"][0]["tensors"]["sample"] == {"dtype": "float32", "shape": [4, 3, 1, 8, 8]}
    assert content["shards"][2]["sha256"] == canonical_json.file_digest(plain.path / names[3])


def test_a_constant_argument_is_stored_once(guided: CalibrationSet) -> None:
    tensors = load_file(guided.path / "shards" / "00000.safetensors")
    assert tensors["cond.encoder_hidden_states"].shape == (1, 6, 3, 8)
    assert tensors["cond.added_cond_kwargs.size"].shape == (3, 6, 2)  # this one changes at every call


@pytest.mark.parametrize(
    ("limit", "batch_size", "sizes"),
    [
        (None, None, [3, 3, 1]),
        (None, 2, [2, 1, 2, 1, 1]),
        (5, None, [3, 2]),
        (4, 2, [2, 1, 1]),
        (3, 5, [3]),
        (99, 1, [1] * 7),
    ],
)
def test_every_cut_yields_the_same_samples_in_order(
    plain: CalibrationSet, limit: int | None, batch_size: int | None, sizes: list[int]
) -> None:
    shards = [load_file(path)["sample"] for path in sorted((plain.path / "shards").iterdir())]
    for step in range(4):
        records = list(plain.batches(step, limit=limit, batch_size=batch_size))
        assert [record.sample.shape[0] for record in records] == sizes
        expected = torch.cat([shard[step] for shard in shards])[:limit]
        assert torch.equal(torch.cat([record.sample for record in records]), expected)
        assert all(record.timestep.shape == () and record.step == step for record in records)


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize(("limit", "batch_size"), [(None, None), (2, None), (3, 2), (4, 1)])
def test_a_cut_may_start_anywhere(
    plain: CalibrationSet, start: int, limit: int | None, batch_size: int | None
) -> None:
    """Seven samples in three shards."""
    whole = torch.cat([record.sample for record in plain.batches(1)])
    end = None if limit is None else start + limit
    records = list(plain.batches(1, start=start, limit=limit, batch_size=batch_size))
    found = torch.cat([record.sample for record in records]) if records else whole[:0]
    assert torch.equal(found, whole[start:end])
    assert all(0 < len(record.sample) <= (batch_size or 3) for record in records)


def test_a_cut_keeps_the_rows_of_a_guided_sample_together(guided: CalibrationSet) -> None:
    for step in range(3):
        whole = list(guided.batches(step))
        ones = list(guided.batches(step, batch_size=1))
        assert len(ones) == guided.num_samples
        for index, one in enumerate(ones):
            shard, row = whole[index // 3], index % 3
            rows = [row, row + shard.sample.shape[0] // 2]
            assert torch.equal(one.sample, shard.sample[rows])
            assert torch.equal(one.sample[0], one.sample[1])  # both halves denoise the same image
            for name in guided.cond_names:
                assert torch.equal(one.cond[name], shard.cond[name][rows])
            assert not one.cond["encoder_hidden_states"][0].any()
            assert one.cond["encoder_hidden_states"][1].any()
            assert one.cond["added_cond_kwargs.size"].unique().item() == step


def test_a_record_replays_the_float_model(
    guided: CalibrationSet, guided_pipeline: Callable[..., Any]
) -> None:
    """Sample, timestep and conditioning together are all that the UNet needs: they lead to the next step."""
    pipe = guided_pipeline()
    pipe.scheduler.set_timesteps(3)

    def predict(record: Record) -> torch.Tensor:
        with torch.no_grad():
            eps = pipe.unet(record.sample, record.timestep, **calibration.nest(record.cond)).sample
        plain, guided = eps.chunk(2)
        return plain + 2.0 * (guided - plain)

    for step in range(2):
        for now, then in zip(guided.batches(step), guided.batches(step + 1), strict=True):
            x = now.sample.chunk(2)[0]
            following = pipe.scheduler.step(predict(now), now.timestep, x).prev_sample
            assert torch.equal(torch.cat([following, following]), then.sample)


def test_a_step_is_read_without_its_neighbours(copied: Path) -> None:
    """All bytes but those of step 2 are overwritten; step 2 does not notice."""
    recorded = calibration.load(copied)
    before = [record.sample.clone() for record in recorded.batches(2)]
    for path, rows in zip(sorted((copied / "shards").iterdir()), (3, 3, 1), strict=True):
        data = bytearray(path.read_bytes())
        marks = [record.sample for record in recorded.batches(0) if record.sample.shape[0] == rows]
        for mark in marks:
            at = data.find(mark.numpy().tobytes())
            if at >= 0:
                data[at : at + mark.nbytes] = b"\0" * mark.nbytes
        path.write_bytes(data)
    after = [record.sample for record in calibration.load(copied).batches(2)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(record.sample.any() for record in calibration.load(copied).batches(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 4}, "step 4 was not recorded; recorded steps are 0-3; calibrate again with more"),
        ({"step": -1}, "step -1 was not recorded"),
        ({"step": 0, "start": -1}, "`start` is -1; expected at least 0"),
        ({"step": 0, "limit": 0}, "`limit` is 0; expected at least 1"),
        ({"step": 0, "batch_size": -2}, "`batch_size` is -2; expected at least 1"),
    ],
)
def test_bad_requests_fail_at_once(plain: CalibrationSet, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        plain.batches(**arguments)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((path / "calibration.json").read_text())
    change(content)
    (path / "calibration.json").write_bytes(canonical_json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(format="errata-calibration/2"),
            "format version 'errata-calibration/2'; this release",
        ),
        (
            lambda c: c.update(format="errata-artifact/1"),
            "not a calibration set: its format is 'errata-artifact/1'",
        ),
        (lambda c: c.pop("format"), "not a calibration set: its format is None"),
        (lambda c: c.pop("calls"), "damaged: the file is missing `calls`"),
        (lambda c: c.update(extra=1), "damaged: the file has the unknown entry `extra`"),
        (lambda c: c["request"].pop("seed"), "damaged: request is missing `seed`"),
        (lambda c: c["request"].update(seed="2"), "damaged: `seed` of request is '2'"),
        (lambda c: c["request"].update(seed=True), "damaged: `seed` of request is True"),
        (lambda c: c["calls"].update(more=1), "damaged: calls has the unknown entry `more`"),
        (lambda c: c["calls"].update(timesteps=["x"]), "damaged: its timesteps are"),
        (lambda c: c.update(calls=None), "damaged: it has shards without calls"),
        (lambda c: c.update(shards=3), "damaged: .*not iterable"),
        (lambda c: c["shards"].pop(), "damaged: it lists 2 shards for 3 sample-batches"),
        (lambda c: c["shards"][1].update(file="../x"), "damaged: its shards are named"),
        (
            lambda c: c["shards"][1].update(num_samples=2),
            "damaged: its shards do not hold the sample-batches",
        ),
    ],
)
def test_a_strange_document_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _rewrite(copied, change)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration.load(copied)
    assert "\n" not in str(caught.value)


def test_what_is_no_calibration_is_refused(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(CalibrationError, match="nowhere` is not a directory; give a directory that"):
        calibration.load(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match="is not a calibration set: it has no calibration.json"):
        calibration.load(tmp_path)
    (copied / "calibration.json").write_text('{"format": ')
    with pytest.raises(CalibrationError, match="cannot be read as JSON"):
        calibration.load(copied)


def test_missing_cut_and_altered_shards_are_told_apart(copied: Path) -> None:
    shard = copied / "shards" / "00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CalibrationError, match=f"00001.safetensors` has {len(data) - 1} bytes, expected"):
        calibration.load(copied)
    shard.unlink()
    with pytest.raises(CalibrationError, match="shard `.*00001.safetensors` is missing"):
        calibration.load(copied)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    recorded = calibration.load(copied)  # the size is right; only a full reading can tell
    with pytest.raises(CalibrationError, match="shard `.*00001.safetensors` was altered: its SHA-256"):
        recorded.verify()
    shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(CalibrationError, match="shard `.*00001.safetensors` cannot be read"):
        list(calibration.load(copied).batches(0))
