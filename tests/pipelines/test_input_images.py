"""Input images and masks from folders, by the commands, for pipelines that need one for each image."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from errata import calibration, cli, compress
from errata.cli.input_images import size_in_use

IMAGES = 6
PROMPTS = "a b\nc\nab\na\nb\na c\n"


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folder(small_pipeline: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `artifact`, of an inpainting pipeline with a cache, `images`, `masks` and `prompts.txt`."""
    folder = tmp_path_factory.mktemp("inpaint")
    small_pipeline("sd inpaint").pipe.save_pretrained(folder / "pipeline")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for number in range(IMAGES):
        picture(number).save(folder / "images" / f"{number}.png")
        picture(100 + number).convert("L").point(lambda value: 255 * (value > 128)).save(
            folder / "masks" / f"{number}.png"
        )
    (folder / "prompts.txt").write_text(PROMPTS)
    given = conditions(folder)
    size = ["--steps", "4", "--samples", "2", "--batch-size", "2"]
    made = ["--calibration", f"{folder}/calibration", "--recipe", "deepcache-2"]
    for command in (
        ["calibrate", f"{folder}/pipeline", "--out", f"{folder}/calibration", *size, *given],
        ["compress", f"{folder}/pipeline", "--out", f"{folder}/compressed", *made],
        ["deploy", f"{folder}/compressed", "--out", f"{folder}/artifact"],
    ):
        assert cli.main(command) == 0
    return folder


def pixels(path: Path) -> Any:
    with Image.open(path) as opened:
        return np.asarray(opened)


def conditions(folder: Path) -> list[str]:
    return [
        *("--prompts", f"{folder}/prompts.txt", "--input-images", f"{folder}/images"),
        *("--masks", f"{folder}/masks"),
    ]


def complaint(capsys: pytest.CaptureFixture[str], *command: object, status: int = 2) -> str:
    """The one line of a command that is used badly."""
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == status
    return capsys.readouterr().err.splitlines()[-1]


def test_images_are_recorded_and_planned_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = next(iter(calibration.load(folder / "calibration").batches(step=0, batch_size=2)))
    assert record.sample.shape[1] == 9
    capsys.readouterr()
    out = tmp_path / "plan.json"
    given = ["plan", f"{folder}/artifact", "--samples", "2", "--batch-size", "2", "--max-overhead", "0%"]
    assert cli.main([*given, *conditions(folder), "--out", f"{out}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]["expected"]
    assert found["samples"] == 2
    assert found["uncorrected"] > 0
    assert out.is_file()


def test_compress_judges_by_images_that_are_given_once_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compress", f"{folder}/pipeline", "--calibration", f"{tmp_path}/set", "--recipe", "w8a8"]
    record = ["calibrate", f"{folder}/pipeline", "--out", f"{tmp_path}/set", "--steps", "4"]
    assert cli.main([*record, "--samples", "4", "--batch-size", "2", *conditions(folder)]) == 0
    places = ["--input-images", f"{folder}/images", "--masks", f"{folder}/masks"]
    assert cli.main([*given, *places, "--out", f"{tmp_path}/judged"]) == 0
    measured = compress.load(tmp_path / "judged").compression.calibrated_output
    assert measured is not None
    assert measured.images == 4
    capsys.readouterr()
    assert cli.main([*given, "--out", f"{tmp_path}/unjudged"]) == 0
    assert "give compress the input images once more" in capsys.readouterr().err
    assert compress.load(tmp_path / "unjudged").compression.calibrated_output is None
    swapped = ["--input-images", folder / "masks", "--masks", folder / "images", "--out", tmp_path / "other"]
    told = complaint(capsys, *given, *swapped, status=1)
    assert "give the input images and other arguments that `calibrate` was given" in told
    few = ["--input-images", tmp_path / "few", "--out", tmp_path / "other"]
    (tmp_path / "few").mkdir()
    picture(0).save(tmp_path / "few" / "0.png")
    assert "needs one for each of 4 images; add input images" in complaint(capsys, *given, *few)
    labels = ["--labels", folder / "prompts.txt", "--out", tmp_path / "other"]
    assert "is not a class label" in complaint(capsys, *given, *labels)
    assert "has no effect with --dry-run" in complaint(capsys, *given, *places, "--dry-run")
    assert not (tmp_path / "other").exists()


def test_each_image_has_its_own_input(folder: Path, tmp_path: Path) -> None:
    given = ["generate", f"{folder}/artifact", "--images", "2", "--batch-size", "1", "--prompt", "a"]
    places = ["--input-images", f"{folder}/images", "--masks", f"{folder}/masks"]
    assert cli.main([*given, *places, "--out", f"{tmp_path}/out"]) == 0
    assert cli.main([*given, *places, "--seed", "1", "--out", f"{tmp_path}/later"]) == 0
    # The same noise and prompt, another input image.
    second, first = pixels(tmp_path / "out" / "00001.png"), pixels(tmp_path / "later" / "00000.png")
    assert not (second == first).all()


def test_what_is_missing_or_has_no_use_is_named_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "broken", "odd", "unpaired"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "0.png").write_text("no picture")
    (tmp_path / "odd" / "0.png").write_bytes((folder / "images" / "0.png").read_bytes())
    picture(1, (20, 16)).save(tmp_path / "odd" / "1.png")
    picture(1).save(tmp_path / "unpaired" / "0.png")
    given = ["plan", folder / "artifact", "--samples", "2", "--out", tmp_path / "plan.json"]
    given += ["--prompts", folder / "prompts.txt"]
    images, masks = ["--input-images", folder / "images"], ["--masks", folder / "masks"]
    for options, message in (
        ([], "StableDiffusionInpaintPipeline needs an input image for every image; add --input-images"),
        (images, "StableDiffusionInpaintPipeline needs a mask for every image; add --masks"),
        (masks, "--masks has no effect without --input-images"),
        (["--input-images", tmp_path / "none"], "none` is not a folder; give one that holds PNG or JPEG"),
        (["--input-images", tmp_path / "empty"], "empty` has no PNG or JPEG file"),
        (["--input-images", tmp_path / "broken"], "broken/0.png` cannot be opened as an image"),
        (["--input-images", tmp_path / "odd"], "1.png` has 20 x 16 pixels and `"),
        (
            ["--input-images", tmp_path / "unpaired"],
            "has 1 input images, and --samples 2 needs one for each of 6",
        ),
        ([*images, "--masks", tmp_path / "unpaired"], "unpaired` has no mask for `"),
    ):
        assert message in complaint(capsys, *given, *options)
    assert not (tmp_path / "plan.json").exists()
    both = ["--image", folder / "images" / "0.png", *images, "--out", tmp_path / "out"]
    assert "both give input images" in complaint(capsys, "generate", folder / "artifact", *both)


@pytest.mark.parametrize(
    ("name", "size", "used"),
    [
        ("sd inpaint", (21, 40), (16, 16)),
        ("sd upscale", (17, 21), (16, 20)),
    ],
)
def test_the_size_in_use_is_that_of_the_pipeline(
    name: str,
    size: tuple[int, int],
    used: tuple[int, int],
    small_pipeline: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = small_pipeline(name)
    assert size_in_use(small.pipe, size) == used
    seen = []
    original = small.pipe.image_processor.preprocess

    def noted(*values: Any, **options: Any) -> torch.Tensor:
        prepared = original(*values, **options)
        seen.append((prepared.shape[3], prepared.shape[2]))
        return prepared

    monkeypatch.setattr(small.pipe.image_processor, "preprocess", noted)
    given = {key: value for key, value in small.inputs.items() if key not in ("image", "mask_image")}
    given["image"] = [picture(number, size) for number in range(2)]
    if "mask_image" in small.inputs:
        given["mask_image"] = [each.convert("L") for each in given["image"]]
    small.pipe(**given, num_inference_steps=1)
    assert seen[0] == used


def test_the_command_says_that_images_are_resized(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        picture(1, (20, 18)).save(tmp_path / name / "a.png")
    given = ["generate", folder / "artifact", "--images", 1, "--prompt", "a", "--out", tmp_path / "out"]
    given += ["--input-images", tmp_path / "images", "--masks", tmp_path / "masks"]
    assert cli.main([*map(str, given)]) == 0
    said = capsys.readouterr().err
    assert "StableDiffusionInpaintPipeline resizes the input images from 20 x 18 to 16 x 16 pixels" in said
    assert pixels(tmp_path / "out" / "00000.png").shape == (16, 16, 3)
