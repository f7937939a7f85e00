"""What `calibrate` and `compress` say before they begin, and what they refuse."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDIMPipeline

from errata import calibration, cli, compress, memory
from errata.calibration import estimation
from errata.cli import compress_options
from errata.compress.jobs import estimation as compress_estimation

SIZE = ["--steps", "3", "--samples", "4", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: DDIMPipeline) -> Path:
    """Holds `pipeline` and `calibration`."""
    folder = tmp_path_factory.mktemp("estimates")
    tiny_pipeline.save_pretrained(folder / "pipeline")
    assert cli.main(["calibrate", f"{folder}/pipeline", "--out", f"{folder}/calibration", *SIZE]) == 0
    return folder


def calibrate(folder: Path, *options: object) -> list[str]:
    return ["calibrate", f"{folder}/pipeline", *map(str, options)]


def compressing(folder: Path, *options: object) -> list[str]:
    common = ["compress", f"{folder}/pipeline", "--calibration", f"{folder}/calibration"]
    return [*common, *map(str, options)]


def answer(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(command) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_of_calibrate_says_what_it_takes_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(calibrate(folder, "--dry-run", *SIZE)) == 0
    text = capsys.readouterr().out
    assert "recording 4 samples of 3 calls in batches of 2: about " in text
    assert text.endswith("nothing was written\n")
    found = answer(capsys, calibrate(folder, "--dry-run", *SIZE, "--out", tmp_path / "set"))
    assert (found["num_samples"], found["batch_size"], found["num_calls"]) == (4, 2, 3)
    stored = sum(file.stat().st_size for file in (folder / "calibration").rglob("*") if file.is_file())
    assert found["disk_bytes"] == stored
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_the_same_on_stderr(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(calibrate(folder, "--out", tmp_path / "set", *SIZE)) == 0
    said = capsys.readouterr()
    assert "errata: recording 4 samples of 3 calls in batches of 2: about " in said.err
    assert said.out == f"calibration: {tmp_path}/set, 4 trajectories of 3 steps\n"
    same = (folder / "calibration", tmp_path / "set")
    first, second = ((each / "calibration.json").read_bytes() for each in same)
    assert first == second


def test_defaults_are_those_of_small_networks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, calibrate(folder, "--dry-run", "--steps", "3"))
    assert (found["num_samples"], found["batch_size"]) == (512, 64)
    (note,) = found["notes"]
    assert note.startswith("512 samples in batches of 64, chosen for a network of ")
    assert note.endswith(" M parameters at 8×8")


def test_explicit_options_win_over_the_preset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = calibrate(folder, "--dry-run", "--steps", "3", "--preset", "laptop")
    sizes = [
        (found["num_samples"], found["batch_size"])
        for options in ((), ("--samples", "5"), ("--batch-size", "16"))
        if (found := answer(capsys, [*dry, *options]))
    ]
    assert sizes == [(64, 8), (5, 8), (64, 16)]


def test_the_number_of_samples_decides_how_many_prompts_are_needed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("1\n")
    command = calibrate(folder, "--dry-run", "--labels", tmp_path / "labels.txt")
    assert cli.main(command) == 2
    assert "does not take a class label; leave --labels out" in capsys.readouterr().err


def test_too_little_memory_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, estimation, compress_estimation):
        monkeypatch.setattr(module, "available_memory", lambda: 100)
    line = refusal(capsys, calibrate(folder, "--out", tmp_path / "set", *SIZE))
    assert line.startswith("errata: error: not enough memory: recording 4 samples of 3 calls in batches of 2")
    assert line.endswith("and 0.1 kB are available; lower --batch-size, or leave it out with --preset laptop")
    line = refusal(capsys, compressing(folder, "--recipe", "w8a8", "--out", tmp_path / "compressed"))
    assert line.startswith("errata: error: not enough memory: compressing with w8a8 from 4 samples needs")
    assert "`" not in line
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    line = refusal(capsys, calibrate(folder, "--out", tmp_path / "set", *SIZE))
    assert line.endswith("and 0.1 kB are available; lower --samples, or choose another --out")
    line = refusal(capsys, compressing(folder, "--recipe", "w8a8", "--out", tmp_path / "compressed"))
    assert line.endswith("and 0.1 kB are available; choose another --out")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_keeps_what_an_earlier_one_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "set"
    shutil.copytree(folder / "calibration", unfinished)
    content = json.loads((unfinished / "calibration.json").read_text())
    content["shards"] = content["shards"][:1]
    (unfinished / "calibration.json").unlink()
    (unfinished / "calibration.partial.json").write_text(json.dumps(content))
    (unfinished / "shards" / "00001.safetensors").unlink()
    before = {file: file.read_bytes() for file in unfinished.rglob("*") if file.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        refusal(capsys, calibrate(folder, "--out", unfinished, *SIZE))
    assert {file: file.read_bytes() for file in unfinished.rglob("*") if file.is_file()} == before
    # Without numbers, those of the unfinished work are taken.
    assert cli.main(calibrate(folder, "--out", unfinished, "--steps", "3")) == 0
    assert "as the unfinished work has them" in capsys.readouterr().err
    assert calibration.load(unfinished).num_samples == 4


def test_a_preset_of_compress_limits_ranges_and_learned_rounding(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, int]] = []

    def estimated(*arguments: Any, samples_per_step: int, **_: Any) -> None:
        given.append((arguments[2].quantization.rounding, samples_per_step))
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "estimate", estimated)
    learned = compressing(folder, "--preset", "laptop", "--out", tmp_path / "out", "--recipe")
    for options in (
        ["w8a8-learned"],
        ["w8a8-learned:samples=512", "--range-samples", "3"],
        ["w8a8-learned", "--rounding-samples", "9", "--rounding-batch-size", "5"],
        ["w8a8"],
    ):
        assert cli.main([*learned, *options]) == 130
    smaller, by_name, by_option, none = given
    assert (smaller[0].samples, smaller[0].batch_size, smaller[0].iterations) == (128, 8, 400)
    assert smaller[1] == 16
    assert (by_name[0].samples, by_name[0].batch_size, by_name[1]) == (512, 8, 3)
    assert (by_option[0].samples, by_option[0].batch_size) == (9, 5)
    assert none == (None, 16)


def test_a_recipe_file_wins_over_the_preset(tmp_path: Path) -> None:
    recipe = compress.Recipe.named("w8a8-learned")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    args = SimpleNamespace(recipe=str(tmp_path / "recipe.yaml"), preset="laptop")
    assert compress_options._with_preset(recipe, args) == recipe  # type: ignore[arg-type]


def test_a_preset_has_no_effect_on_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(compressing(folder, "--recipe", "w8a8", "--sensitivity", "--preset", "laptop")) == 2
    assert "--preset has no effect with --sensitivity; leave it out" in capsys.readouterr().err


def test_a_dry_run_of_compress_has_an_estimate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, compressing(folder, "--recipe", "w8a8", "--dry-run"))
    assert found["estimate"]["work"] == "compressing with w8a8 from 4 samples"
    assert cli.main(compressing(folder, "--recipe", "w8a8", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "compressing with w8a8 from 4 samples: about " in text
    assert text.endswith("nothing was written\n")
