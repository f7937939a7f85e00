"""`errata compress`: what its options do, what it says, and what it refuses."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from errata import calibration, cli, compress, deploy
from errata.compress import Recipe
from errata.compress.jobs.dry_run import Preview

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: DDIMPipeline) -> Path:
    """Holds `pipeline` and `calibration`."""
    folder = tmp_path_factory.mktemp("compress")
    tiny_pipeline.save_pretrained(folder / "pipeline")
    size = ["--steps", str(STEPS), "--samples", "4", "--batch-size", "4"]
    assert cli.main(["calibrate", f"{folder}/pipeline", "--out", f"{folder}/calibration", *size]) == 0
    return folder


def command(folder: Path, recipe: str, *options: object) -> list[str]:
    common = ["compress", f"{folder}/pipeline", "--calibration", f"{folder}/calibration", "--recipe", recipe]
    return [*common, *map(str, options)]


def answer(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """What a successful command prints with `--json`."""
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_blocks_are_shown_and_summed_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--iterations", 2, "--rounding-samples", 8, "--rounding-batch-size", 4, "--rounding-seed", 0]
    arguments = command(folder, "w4a8-learned", *options, "--learning-rate", 0.02, "--out", tmp_path / "out")
    assert cli.main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["recipe"] == "w4a8-learned:iterations=2,learning_rate=0.02,samples=8,batch_size=4"
    total = len(found["blocks"])
    assert total > 3
    for index, block in enumerate(found["blocks"]):
        assert (block["index"], block["total"], block["is_resumed"]) == (index, total, False)
        assert block["phase"] == "learned rounding"
        assert 0 <= block["loss_after"] <= block["loss_before"]
        assert f"block {index + 1} of {total}, {block['name']}: loss " in said.err
    assert said.err.count(" left\n") == total - 1
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 50e6
    assert logging.getLogger("errata.compress").level == logging.NOTSET


def test_patterns_spare_layers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            {
                "type": "Recipe",
                "schema": 2,
                "quantization": {"weight_bits": 4, "activation_bits": 8, "bits": {"*.conv2": 8}},
                "cache": None,
            }
        )
    )
    options = ["--keep", "mid_block", "--keep", "conv_out", "--bits", "*.0.conv2=4", "--bits", "*.conv1=8"]
    found = answer(capsys, command(folder, f"{tmp_path}/recipe.json", *options, "--dry-run"))
    schemes = {layer["name"]: layer["scheme"] for layer in found["layers"]}
    assert schemes["mid_block.resnets.0.conv1"] == schemes["conv_out"] == "float"
    assert "mid_block.attentions.0" not in schemes
    assert schemes["down_blocks.0.resnets.0.conv1"] == "w8a8"
    assert schemes["down_blocks.0.resnets.0.conv2"] == "w4a8"
    assert schemes["down_blocks.0.resnets.1.conv2"] == "w8a8"
    assert list(found["recipe"]["quantization"]["bits"]) == ["*.0.conv2", "*.conv1", "*.conv2"]


def test_a_dry_run_shows_everything_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    arguments = command(folder, "w4a8-learned+cachequant-2", "--dry-run", "--out", tmp_path / "out")
    assert cli.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "up_blocks.1.resnets.0.conv1 conv2d w4a8 16 + 16 16 x 32 x 3 x 3 2432",
        "mid_block.attentions.0 attention a8 matmuls",
        "searched on the trajectories: 2 of 3 steps full (3 of the up path's resnets recomputed)",
        "learned, 400 iterations per block on 512 inputs",
        "nothing was written",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
    assert sorted(folder.rglob("*")) == before
    uniform = answer(capsys, command(folder, "deepcache-2", "--dry-run"))
    assert uniform["schedule"] == [0, 2]
    assert uniform["bytes"] == {
        "float parameters": uniform["float32_bytes"],
        "total": uniform["float32_bytes"],
    }
    assert cli.main(command(folder, "deepcache-2", "--dry-run")) == 0
    assert "FcF (3 of the up path's resnets recomputed)" in capsys.readouterr().out


RECIPES = [
    Recipe.named("w8a8"),
    Recipe.named("w4a8+deepcache-2:branch=2,equalization=true,bias_correction=true"),
    Recipe.named("w4a8+cachequant-2:search=uniform"),
    Recipe.named("deepcache-2"),
    Recipe(
        quantization=compress.Quantization(
            weight_bits=4,
            activation_bits=8,
            bits={"*.conv1": 8},
            modules_to_not_convert=("conv_in", "*.attentions"),
        )
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_sizes_are_those_of_the_exported_tensors(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    pipe = calibration.load_pipeline(folder / "pipeline")
    recording = calibration.load(folder / "calibration")
    preview = Preview.of(pipe, recipe, num_steps=STEPS)
    compressed = compress.apply(pipe, recording, recipe, tmp_path / "compressed")
    assert preview.schedule == compressed.schedule
    tensors = load_file(deploy.export(compressed, tmp_path / "artifact") / "unet" / "errata.safetensors")
    assert preview.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    codes = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".codes"))
    assert preview.sizes.get("codes", 0) == codes
    quantized = [layer for layer in preview.layers if layer.scheme.startswith("w")]
    assert [layer.name for layer in quantized] == [
        layer.name for layer in compressed.compression.scheme.layers
    ]


def test_sensitivity_is_shown_and_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sensitivity", "--sensitivity-samples", 2, "--sensitivity-steps", 1]
    keep = ["--keep", "down_blocks", "--keep", "up_blocks.0"]
    arguments = command(folder, "w4a8", *options, *keep)
    found = answer(capsys, [*arguments, "--out", f"{tmp_path}/table.json"])
    assert found == json.loads((tmp_path / "table.json").read_text())
    assert (found["samples"], len(found["steps"])) == (2, 1)
    assert cli.main([*arguments, "--out", f"{tmp_path}/table.csv"]) == 0
    assert "suggestion: " in capsys.readouterr().out
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + len(found["rows"])
    assert cli.main([*arguments, "--out", f"{tmp_path}/table.csv"]) == 2
    assert "table.csv` exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("w8a8", [], "--out is required"),
        (
            "deepcache-2",
            ["--dry-run", "--keep", "x"],
            "--keep has no effect with the recipe deepcache-2, which",
        ),
        ("deepcache-2", ["--dry-run", "--bits", "x=4"], "--bits has no effect with the recipe deepcache-2"),
        (
            "w4a8",
            ["--dry-run", "--iterations", "5"],
            "--iterations has no effect with the recipe w4a8, which",
        ),
        ("w8a8", ["--dry-run", "--rounding-seed", "0"], "which rounds to nearest; choose w8a8-learned"),
        (
            "deepcache-2",
            ["--dry-run", "--rounding-seed", "0"],
            "--rounding-seed has no effect with the recipe",
        ),
        ("w4a8", ["--dry-run", "--sensitivity"], "--dry-run and --sensitivity exclude each other"),
        (
            "w4a8",
            ["--dry-run", "--sensitivity-steps", "2"],
            "--sensitivity-steps has no effect without --sens",
        ),
        ("w4a8", ["--dry-run", "--range-samples", "2"], "--range-samples has no effect with --dry-run"),
        (
            "w4a8",
            ["--sensitivity", "--range-samples", "2"],
            "--range-samples has no effect with --sensitivity",
        ),
        ("deepcache-2", ["--sensitivity"], "--sensitivity has no effect with the recipe deepcache-2"),
        ("w4a8", ["--sensitivity", "--out", "table.txt"], "the name of the file must end in .json or .csv"),
        ("deepcache-2", ["--out", "x", "--range-samples", "2"], "has no effect with the recipe deepcache-2"),
        (
            "w4a8",
            ["--dry-run", "--bits", "conv_in"],
            "`conv_in` is not PATTERN=BITS with BITS one of 4, 6 and 8",
        ),
        (
            "w4a8",
            ["--dry-run", "--bits", "conv_in=3"],
            "`conv_in=3` is not PATTERN=BITS with BITS one of 4, 6 and 8",
        ),
        ("w4a8", ["--dry-run", "--learning-rate", "nan"], "`nan` is not a finite number above zero"),
        ("w4a8:iterations=3", ["--dry-run"], "option 'iterations' does not apply"),
    ],
)
def test_options_without_use_are_refused(
    recipe: str, options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(folder, recipe, *options)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "nowhere"], "pattern 'nowhere' of the recipe matches no layer of this UNet2DModel"),
        (["--keep", "*"], "leaves nothing to quantize"),
    ],
)
def test_patterns_must_mean_something(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(folder, "w4a8", *options, "--dry-run")) == 1
    assert message in capsys.readouterr().err


def test_a_taken_directory_is_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("kept")
    monkeypatch.setattr(calibration, "load_pipeline", lambda source: pytest.fail("opened the pipeline"))
    for mode in ([], ["--dry-run"]):
        assert cli.main(command(folder, "w8a8", "--out", tmp_path, *mode)) == 1
        assert "exists and is not empty" in capsys.readouterr().err
