"""Models that want labels, prompts or pictures, from recording to images, and what is said without them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel

from errata import calibration, cli, report
from errata.cli import inputs
from errata.cli.usage import UsageError
from errata.errors import CalibrationError, ErrataError
from errata.pipelines import ClassConditionalLDMPipeline

SIZE = ["--steps", "2", "--samples", "4", "--batch-size", "3"]
LABELS = 4
# datasets leaves the file that it streams from to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Upscaler:
    def __call__(self, prompt: str, image: Any, guidance_scale: float = 1.0) -> None: ...


class Unconditional:
    def __call__(self, batch_size: int = 1) -> None: ...


def small_pipeline(num_class_embeds: int | None) -> ClassConditionalLDMPipeline:
    blocks: dict[str, Any] = {"block_out_channels": (16,), "norm_num_groups": 8}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            num_class_embeds=num_class_embeds,
            add_attention=False,
            **blocks,
        )
        vae = VQModel(latent_channels=4, **blocks)
    last = None if num_class_embeds is None else num_class_embeds - 1
    return ClassConditionalLDMPipeline(vae, unet, DDIMScheduler(), unconditional_label=last)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds pipelines `classes` and `plain`, `labels.csv`, and `calibration` and `artifact` of the first."""
    folder = tmp_path_factory.mktemp("conditions")
    small_pipeline(LABELS).save_pretrained(folder / "classes")
    small_pipeline(None).save_pretrained(folder / "plain")
    (folder / "labels.csv").write_text("name,label\na,0\nb,1\nc,2\nd,3\ne,99\n")
    labels = ["--labels", f"{folder}/labels.csv:label", "--guidance-scale", "2"]
    recipe = ["--calibration", f"{folder}/calibration", "--recipe", "w8a8+cachequant-2"]
    for command in (
        ["calibrate", f"{folder}/classes", "--out", f"{folder}/calibration", *SIZE, *labels],
        ["compress", f"{folder}/classes", "--out", f"{folder}/compressed", *recipe],
        ["deploy", f"{folder}/compressed", "--out", f"{folder}/artifact"],
    ):
        assert cli.main(command) == 0
    return folder


def complaint(capsys: pytest.CaptureFixture[str], status: int, *command: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == status
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def answer(capsys: pytest.CaptureFixture[str], *command: object) -> Any:
    """What a successful command prints with `--json`."""
    capsys.readouterr()
    assert cli.main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_labels_are_recorded_in_their_order(folder: Path) -> None:
    recording = calibration.load(folder / "calibration")
    batches = recording.batches(step=0, batch_size=3)
    nothing = LABELS - 1
    assert [record.cond["class_labels"].tolist() for record in batches] == [
        [nothing] * 3 + [0, 1, 2],
        [nothing, 3],
    ]


def test_a_label_is_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for label in (0, 1):
        out = tmp_path / str(label)
        options = ["--images", "1", "--label", str(label), "--guidance-scale", "2"]
        assert cli.main(["generate", f"{folder}/artifact", "--out", f"{out}", *options]) == 0
        pictures.append((out / "00000.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_components_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{folder}/artifact"]) == 0
    text = capsys.readouterr().out
    assert "components   scheduler " in text
    assert ", unet " in text
    assert ", vae " in text
    assert "1 of 2 calls are full (F); a cached call (c) recomputes the last resnet of the up path" in text
    assert "\n             Fc\n" in text


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "classes",
            [],
            "ClassConditionalLDMPipeline needs a class label for every image; add --labels",
        ),
        (
            "classes",
            ["--labels", "labels.csv:label", "--negative-prompt", "x"],
            "not take a negative prompt;",
        ),
        ("classes", ["--labels", "labels.csv:label", "--prompts", "labels.csv:name"], "leave --prompts out"),
        ("classes", ["--labels", "labels.csv:name"], "holds 'a', which is not a class label"),
        (
            "classes",
            ["--labels", "labels.csv:label", "--samples", "5"],
            "99 is out of range; allowed are 0 to 3",
        ),
        (
            "classes",
            ["--labels", "labels.csv:label", "--samples", "6"],
            "has 5 labels, and --samples 6 needs",
        ),
        (
            "classes",
            ["--prompts", "labels.csv:name", "--samples", "6"],
            "has 5 prompts, and --samples 6 needs one",
        ),
        ("plain", ["--labels", "labels.csv:label"], "does not take a class label; leave --labels out"),
        ("plain", ["--guidance-scale", "inf"], "`inf` is not a finite number"),
    ],
)
def test_calibrate_names_what_is_missing_or_has_no_use(
    model: str,
    options: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert message in complaint(capsys, 2, "calibrate", model, "--out", tmp_path / "out", *SIZE, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "ClassConditionalLDMPipeline needs a class label for every image; add --label"),
        (["--label", "4"], "class label 4 is out of range; allowed are 0 to 3"),
        (["--label", "-1"], "class label -1 is out of range; allowed are 0 to 3"),
        (["--label", "0", "--prompt", "x"], "does not take a prompt; leave --prompt out"),
        (["--label", "0", "--image", "x.png"], "does not take an input image; leave --image out"),
        (["--label", "0", "--guidance-scale", "nan"], "`nan` is not a finite number"),
    ],
)
def test_generate_names_what_is_missing_or_has_no_use(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, 2, "generate", folder / "artifact", "--out", tmp_path / "out", *options)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def pooled() -> torch.nn.Module:
    """A feature network of a user's own."""
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


@pytest.fixture
def measurable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """`errata report` on the artifact, in features of a module of the user's."""
    (tmp_path / "my_features.py").write_text(
        "from torch import nn\n"
        "from errata.quality import Metric\n"
        "brightness = Metric(name='brightness', title='Brightness', higher_is_better=True, needs='images',\n"
        "    compute=lambda images: images.mean(dim=(1, 2, 3)), description='mean of all pixels')\n"
        "def pooled():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    real = report.Reference(pooled(), report.statistics(torch.rand(20, 3)), "noise", "pooled")
    real.save(tmp_path / "real.npz")
    return [
        *("report", f"{folder}/artifact", "--reference", f"{tmp_path}/real.npz", "--resamples", "5"),
        *("--features", "my_features:pooled", "--out", f"{tmp_path}/out", "--samples", "4"),
    ]


def test_a_report_draws_labels(
    folder: Path, measurable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["--labels", f"{folder}/labels.csv:label", "--guidance-scale", "2"]
    mine = ["--metric", "my_features:brightness"]
    found = answer(capsys, *measurable, *labels, *mine, "--no-compute-matched", "--at", "all")
    assert [row["plan"] for row in found["rows"]] == ["none", "all"]
    assert all(0 < row["metrics"]["brightness"]["value"] < 1 for row in found["rows"])
    assert "--metric my_features:brightness" in found["protocol"]["command"]
    assert f"--labels {folder}/labels.csv:label --guidance-scale 2.0" in found["protocol"]["command"]
    (tmp_path / "others.txt").write_text("3\n3\n3\n3\n")
    others = ["--labels", f"{tmp_path}/others.txt", "--guidance-scale", "2"]
    out = [word.replace("/out", "/out2") for word in measurable]
    again = answer(capsys, *out, *others, "--no-equal-compute", "--at", "all")
    assert again["rows"][0]["frechet"]["value"] != found["rows"][0]["frechet"]["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a class label for every image; add --labels"),
        (["--prompts", "p"], "cannot be read"),
        (
            ["--labels", "labels.csv:label", "--samples", "9"],
            "has 5 labels, and --samples 9 needs",
        ),
        (["--labels", "labels.csv:label", "--samples", "5"], "class label 99 is out of range; allowed are 0"),
        (["--labels", "labels.csv:label", "--clip", "x"], "--clip compares images with their prompts"),
        (["--labels", "labels.csv:label", "--metric", "my_features:pooled"], "is a function; it must be"),
        (["--labels", "labels.csv:label", "--shard", "4/4"], "shard 4/4: write I/N with I from 0 to N - 1"),
        (
            ["--labels", "labels.csv:label", "--features", "digit-features"],
            "has dimension 3, feature network",
        ),
    ],
)
def test_a_report_names_what_is_missing_or_has_no_use(
    options: list[str],
    message: str,
    folder: Path,
    measurable: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spelled = [word.replace("labels.csv", f"{folder}/labels.csv") for word in options]
    line = complaint(capsys, 1 if "dimension" in message else 2, *measurable, *spelled)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_shards_of_a_report_are_merged(
    folder: Path, measurable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--labels", f"{folder}/labels.csv:label", "--batch-size", "1", "--no-equal-compute"]
    for index in range(2):
        said = answer(capsys, *measurable, *options, "--shard", f"{index}/2")
        assert said == {"shard": f"{index}/2", "out": f"{tmp_path}/out"}
        if index == 0:
            line = complaint(capsys, 1, "report", "--merge", tmp_path / "out", "--out", tmp_path / "out")
            assert "2 of 4 batches are not complete (numbers 1, 3, from 0)" in line
    merged = answer(capsys, "report", "--merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert [row["samples"] for row in merged["rows"]] == [4] * len(merged["rows"])
    assert (tmp_path / "merged" / "report.html").is_file()


def test_a_plan_for_a_labelled_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("0\n1\n2\n3\n0\n2\n")
    (tmp_path / "few.txt").write_text("0\n1\n2\n")
    given = ["plan", folder / "artifact", "--samples", "2", "--batch-size", "2", "--max-overhead", "0%"]
    given += ["--guidance-scale", "2", "--out", tmp_path / "plan.json"]
    assert "needs a class label for every image; add --labels" in complaint(capsys, 2, *given)
    line = complaint(capsys, 2, *given, "--labels", tmp_path / "few.txt")
    assert "has 3 labels, and --samples 2 needs one for each of 6 images" in line
    found = answer(capsys, *given, "--labels", tmp_path / "labels.txt")
    assert found["plan"]["expected"]["samples"] == 2
    assert found["plan"]["expected"]["candidates_tried"] > 2


def test_what_pipelines_take_and_need() -> None:
    assert inputs.needs(Upscaler()) == ("prompt", "image")
    assert inputs.needs(Unconditional()) == ()
    with pytest.raises(UsageError, match="Unconditional does not take a guidance scale; leave --g out"):
        inputs.check_argument(Unconditional(), "guidance_scale", flag="--g", is_given=True)
    inputs.check_labels(Unconditional(), [10**6])


def test_an_upscaler_needs_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.calibration.load_pipeline", lambda source: Upscaler())
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    given = ("calibrate", "x", "--out", tmp_path / "out", "--samples", "2")
    line = complaint(capsys, 2, *given, "--prompts", tmp_path / "prompts.txt")
    assert "Upscaler needs an input image for every image; add --input-images" in line


def test_every_image_gets_its_own_prompt_and_picture(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "small.png")
    args = argparse.Namespace(
        prompt="a",
        negative_prompt=None,
        label=None,
        image=tmp_path / "small.png",
        guidance_scale=2.0,
        steps=None,
        input_images=None,
        masks=None,
    )
    made = inputs.call_arguments(Upscaler(), args)(2)
    assert made["prompt"] == ["a", "a"]
    assert [picture.size for picture in made["image"]] == [(2, 2), (2, 2)]
    assert made["guidance_scale"] == 2.0
    args.image = tmp_path / "none.png"
    with pytest.raises(UsageError, match="cannot be opened as an image"):
        inputs.call_arguments(Upscaler(), args)


def test_refusals_of_a_pipeline_are_one_line() -> None:
    with (
        pytest.raises(ErrataError, match=r"^Upscaler rejected its arguments: too tall$"),
        inputs.rejections_as_errors(Upscaler()),
    ):
        raise ValueError("too tall\nby far")
    with pytest.raises(CalibrationError, match="mine"), inputs.rejections_as_errors(Upscaler()):
        raise CalibrationError("mine")


def test_guidance_without_an_unconditional_class_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--guidance-scale", "2", "--out", tmp_path / "out", *SIZE]
    assert "refused its arguments: guidance needs" in complaint(
        capsys, 1, "calibrate", folder / "plain", *options
    )


def test_the_summary_shows_the_schedule(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", f"{folder}/classes", "--calibration", f"{folder}/calibration"]
    assert cli.main([*command, "--recipe", "deepcache-2", "--out", f"{tmp_path}/cached"]) == 0
    assert (
        "\ncache: Fc (F: full call; c: cached call, recomputes the last resnet of the"
        in capsys.readouterr().out
    )
    assert cli.main([*command, "--recipe", "deepcache-2", "--out", f"{tmp_path}/again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["full_steps"] == [0]


def test_a_recipe_file_is_named_where_it_cannot_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "compress",
        folder / "classes",
        "--calibration",
        folder / "calibration",
        "--dry-run",
        "--recipe",
    ]
    line = complaint(capsys, 2, *command, tmp_path / "no.yaml")
    assert "no.yaml`: no such file; give a file, or a name such as w4a8" in line
    (tmp_path / "odd.yaml").write_text("bits: 4\n")
    line = complaint(capsys, 2, *command, tmp_path / "odd.yaml")
    assert "odd.yaml`: not a recipe of schema 2" in line
    assert cli.main([*map(str, command), "w8a8", "--keep", "conv_in"]) == 0
    assert "exceptions         not quantized: conv_in" in capsys.readouterr().out
