"""Killed and resumed: the same bytes as one run through; anything else than the same request is refused."""

import filecmp
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from forked import COMMAND, ForkServer

import errata
from errata import calibration, cli, compress
from errata.compress.jobs.stages import work_directory
from errata.errors import RecipeError
from errata.journal import Journal, Make

STEPS = 4
RECIPE = "w4a8-learned+cachequant-2:iterations=3,samples=8,batch_size=4"
KILLS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_plain_unet: Callable[..., UNet2DModel]) -> Path:
    """Holds `pipeline` and `calibration`."""
    folder = tmp_path_factory.mktemp("resume")
    unet = make_plain_unet(layers_per_block=1)
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder / "pipeline")
    pipe = calibration.load_pipeline(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    calibration.collect(pipe, folder / "calibration", num_inference_steps=STEPS, num_samples=4, batch_size=2)
    return folder


def differing_files(one: Path, other: Path) -> list[str]:
    names = {path.relative_to(root) for root in (one, other) for path in root.rglob("*") if path.is_file()}
    return sorted(
        str(name)
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or not filecmp.cmp(one / name, other / name, shallow=False)
    )


def kill_and_resume(forked: ForkServer, command: list[str], stages: Path, targets: list[int]) -> str:
    """What the last run says; each earlier one is killed when so many stages are finished."""
    draw = random.Random(5)
    for target in targets:
        killed = forked.start(COMMAND, *command)
        deadline = time.monotonic() + 120
        while len(list(stages.glob("*.safetensors"))) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        killed.kill()
        assert killed.wait() == -signal.SIGKILL, killed.stderr
    finished = forked.run(COMMAND, *command)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def test_killed_three_times_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: ForkServer
) -> None:
    command = ["compress", f"{folder}/pipeline", "--calibration", f"{folder}/calibration", "--recipe", RECIPE]
    names: list[str] = []
    stage = Journal.stage

    def counted(self: Journal, name: str, make: Make) -> dict[str, torch.Tensor]:
        names.append(name)
        return stage(self, name, make)

    monkeypatch.setattr(Journal, "stage", counted)
    assert cli.main([*command, "--out", f"{tmp_path}/through"]) == 0
    assert not work_directory(tmp_path / "through").exists()
    targets = sorted(random.Random(5).sample(range(1, len(names)), KILLS))
    stages = work_directory(tmp_path / "killed") / "stages"
    said = kill_and_resume(forked, [*command, "--out", f"{tmp_path}/killed"], stages, targets)
    assert re.search(r"resuming: \d+ of \d+ blocks are done \(learned rounding\)", said)
    assert differing_files(tmp_path / "through", tmp_path / "killed") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "through"]


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, recipe: str = "w8a8") -> None:
    """Leaves the work of `apply` as Ctrl-C does when activation ranges are about to be observed."""
    pipe, recording = opened(folder)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("errata.compress.jobs.work.observe_ranges", stop)
        with pytest.raises(KeyboardInterrupt):
            compress.apply(pipe, recording, recipe, out)
    assert [path.name for path in (work_directory(out) / "stages").iterdir()] == ["weights.safetensors"]


def opened(folder: Path) -> tuple[DDIMPipeline, calibration.CalibrationSet]:
    pipe = calibration.load_pipeline(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe, calibration.load(folder / "calibration")


def test_a_changed_recipe_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    pipe, recording = opened(folder)
    with pytest.raises(RecipeError) as caught:
        compress.apply(pipe, recording, "w4a8", tmp_path / "out")
    message = str(caught.value)
    assert "recipe.quantization.weight_bits was 8, is now 4;" in message
    assert f"choose another directory, or remove `{tmp_path / 'out.partial'}` to start over" in message
    with pytest.raises(RecipeError, match=r"of another request: samples per step was 64, is now 2; repeat"):
        compress.apply(pipe, recording, "w8a8", tmp_path / "out", samples_per_step=2)
    assert compress.apply(pipe, recording, "w8a8", tmp_path / "out").path == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_calibration_data_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    pipe, _ = opened(folder)
    other = calibration.collect(
        pipe, tmp_path / "other", num_inference_steps=STEPS, num_samples=4, batch_size=4, seed=1
    )
    with pytest.raises(RecipeError, match=r"request: calibration data was \w{12}…, is now \w{12}…; repeat"):
        compress.apply(pipe, other, "w8a8", tmp_path / "out")


def test_another_model_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_plain_unet: Callable[..., UNet2DModel],
) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    torch.manual_seed(7)  # not that of the model in the folder
    pipe = DDIMPipeline(unet=make_plain_unet(layers_per_block=1), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    recording = calibration.collect(
        pipe, tmp_path / "other", num_inference_steps=STEPS, num_samples=4, batch_size=2
    )
    changed = r"model was \w{12}…, is now \w{12}…; calibration data was \w{12}…, is now \w{12}…; repeat"
    with pytest.raises(RecipeError, match=changed):
        compress.apply(pipe, recording, "w8a8", tmp_path / "out")


def test_another_release_or_machine_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    pipe, recording = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(errata, "__version__", "99")
        patch.setattr(torch, "get_num_threads", lambda: 3)
        with pytest.raises(
            RecipeError, match=r"threads was 1, is now 3; versions.errata was [\d.]+, is now 99; repeat"
        ):
            compress.apply(pipe, recording, "w8a8", tmp_path / "out")


def test_ctrl_c_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    command = ["compress", f"{folder}/pipeline", "--calibration", f"{folder}/calibration"]
    command += ["--recipe", "w8a8", "--out", f"{tmp_path}/out"]
    with monkeypatch.context() as patch:
        patch.setattr("errata.compress.jobs.work.observe_ranges", stop)
        assert cli.main(command) == 130
    assert capsys.readouterr().err.endswith(
        f"errata: error: interrupted; 1 finished stages are kept in `{tmp_path}/out.partial`; "
        "to resume, give the same command again\n"
    )
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert f"errata: resuming: 1 finished stages are in `{tmp_path}/out.partial`\n" in said.err
    assert said.out.startswith(f"compressed with w8a8: {tmp_path}/out\n")
