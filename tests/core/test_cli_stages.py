"""The commands that need the stages, on a model of milliseconds, through the front door."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from errata import cli, deploy
from errata.deploy import engines

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Path:
    """Holds `pipeline`, `calibration`, `compressed` and `artifact`, made by the commands."""
    folder = tmp_path_factory.mktemp("life")
    tiny_pipeline.save_pretrained(folder / "pipeline")
    size = ["--steps", str(STEPS), "--samples", "4", "--batch-size", "4"]
    recipe = ["--calibration", f"{folder}/calibration", "--recipe", "w8a8+deepcache-2"]
    for command in (
        ["calibrate", f"{folder}/pipeline", "--out", f"{folder}/calibration", *size],
        ["compress", f"{folder}/pipeline", "--out", f"{folder}/compressed", *recipe],
        ["deploy", f"{folder}/compressed", "--out", f"{folder}/artifact"],
    ):
        assert cli.main(command) == 0
    return folder


def answer(capsys: pytest.CaptureFixture[str], *command: object) -> dict[str, Any]:
    """What a successful command prints with `--json`: one object, on one line."""
    capsys.readouterr()
    assert cli.main([*map(str, command), "--json"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    parsed: dict[str, Any] = json.loads(said)
    return parsed


def complaint(capsys: pytest.CaptureFixture[str], status: int, *command: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == status
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert line.startswith("errata: error: ")
    return line


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(Image.open(path)).astype(np.int32)


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "verify", folder / "artifact")["verified"] is True
    assert cli.main(["verify", f"{folder}/artifact"]) == 0
    assert f"verified: {folder}/artifact" in capsys.readouterr().out


def test_inspect_shows_the_cache_and_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", folder / "artifact")
    assert found["cache"] == "FcFc"
    assert cli.main(["inspect", f"{folder}/artifact"]) == 0
    text = capsys.readouterr().out
    assert "FcFc" in text
    assert [row["layer"] for row in found["layers"] if row["layer"] not in text] == []


def test_inspect_counts_each_byte_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {row["layer"]: row for row in answer(capsys, "inspect", folder / "artifact")["layers"]}
    # 16 x 1 x 3 x 3 codes; 16 weight scales and biases in float32; per step a float32 scale and a zero point
    assert layers["conv_in"]["bytes"] == 16 * 9 + 4 * 16 + 4 * 16 + STEPS * 5
    stored = sum(path.stat().st_size for path in (folder / "artifact" / "unet").glob("*.safetensors"))
    assert 0.5 * stored < sum(row["bytes"] for row in layers.values()) < stored


def test_inspect_says_what_an_engineer_asks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", folder / "artifact")
    assert cli.main(["inspect", f"{folder}/artifact"]) == 0
    text = capsys.readouterr().out
    facts = {line[:12].strip(): line[13:] for line in text.split("\n\n")[0].splitlines()}
    assert facts["digest"] == found["manifest_sha256"]
    assert facts["sampler"] == f"DDIMScheduler, {STEPS} steps, {STEPS} denoiser calls at timesteps 750 to 0"
    assert facts["cache"].startswith(
        "2 of 4 calls are full (F); a cached call (c) recomputes the last 3 resnets"
    )
    assert "errata" in facts["made by"]
    assert "fingerprint" in text
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows["conv_in"]["shape"] == [16, 1, 3, 3]
    assert (rows["conv_in"]["weight_bits"], rows["conv_in"]["input_bits"]) == (8, 8)
    assert rows["time_embedding.linear_1"]["input_bits"] is None
    assert rows["mid_block.attentions.0"]["kind"] == "attention"
    weights = sum(np.prod(row["shape"]) for row in found["layers"] if row["shape"])
    assert f"  {weights:,}  " in text.split("\n\n")[1]


def test_inspect_loads_only_to_tell_kernels(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata import deploy

    found = answer(capsys, "inspect", folder / "artifact", "--backends", "--backend", "reference")
    assert {row["backend"] for row in found["layers"]} == {"reference"}
    assert all(row["reason"] for row in found["layers"])
    for option in ("--device", "--backend"):
        line = complaint(capsys, 2, "inspect", folder / "artifact", option, "reference")
        assert f"{option} has no effect without --backends" in line
    monkeypatch.delattr(deploy, "load")
    assert "backend" not in answer(capsys, "inspect", folder / "artifact")["layers"][0]


def test_a_long_schedule_is_drawn_in_numbered_lines() -> None:
    from errata.cli.output import _picture

    numbers = "".join(f"{number:<10}" for number in range(100, 130, 10)).rstrip()
    assert _picture("F" + "c" * 128)[1:] == ["F" + "c" * 99, numbers, "c" * 29]


def test_an_image_depends_on_its_seed_alone(folder: Path, tmp_path: Path) -> None:
    for name, options in {
        "three": ["--images", "3"],
        "apart": ["--images", "3", "--batch-size", "2"],
        "one": ["--images", "1", "--seed", "2"],
    }.items():
        assert cli.main(["generate", f"{folder}/artifact", "--out", f"{tmp_path}/{name}", *options]) == 0
    names = ["00000.png", "00001.png", "00002.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == names
    for name in names:
        difference = pixels(tmp_path / "three" / name) - pixels(tmp_path / "apart" / name)
        assert abs(difference).max() <= 1
    last = pixels(tmp_path / "three" / "00002.png")
    assert abs(last - pixels(tmp_path / "one" / "00000.png")).max() <= 1
    assert abs(last - pixels(tmp_path / "three" / "00001.png")).max() > 10


def test_generate_counts_what_a_correction_adds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", folder / "artifact", "--images", 2]
    capsys.readouterr()
    assert cli.main([*map(str, command), "--out", f"{tmp_path}/quiet"]) == 0
    assert capsys.readouterr().err == ""  # no progress bars where nobody watches
    plain = answer(capsys, *command, "--out", tmp_path / "plain")
    assert plain["evaluations_per_image"] == {"full": 2, "cached": 2}
    assert plain["overhead"] == 0
    corrected = answer(capsys, *command, "--out", tmp_path / "corrected", "--correct", "iec", "--at", "0")
    assert corrected["evaluations_per_image"] == {"full": 3, "cached": 2}
    assert 0 < corrected["overhead"] < 1
    assert abs(pixels(tmp_path / "plain/grid.png") - pixels(tmp_path / "corrected/grid.png")).max() > 1


def test_generate_maps_other_numbers_of_steps_where_it_is_told_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = deploy.verify(folder / "artifact").sampler.num_inference_steps
    options = ["--images", "2", "--steps", str(recorded + 2), "--on-mismatch", "nearest"]
    for name, more in (("plain", []), ("corrected", ["--correct", "iec", "--at", "all"])):
        status = cli.main(["generate", f"{folder}/artifact", "--out", f"{tmp_path}/{name}", *options, *more])
        assert status == 0
        told = capsys.readouterr().out
        assert f"{recorded + 2} steps with the ranges of the nearest of {recorded} calibrated steps" in told
        assert len(list((tmp_path / name).glob("0*.png"))) == 2


@pytest.mark.parametrize(
    ("status", "options", "message"),
    [
        (2, ["--prompt", "a cat"], "DDIMPipeline does not take a prompt; leave --prompt out"),
        (2, ["--correct", "iec", "--at", "sometimes"], "'sometimes' is not a selection of steps"),
        (1, ["--correct", "iec", "--at", "1"], "leaves nothing to correct"),
        (1, ["--correct", "iec", "--at", "99"], "reaches step 99"),
        (1, ["--steps", "50"], "--steps 50"),
        (1, ["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_generate_refuses_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    options: list[str],
    message: str,
) -> None:
    line = complaint(capsys, status, "generate", folder / "artifact", "--out", tmp_path / "images", *options)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_an_output_directory_in_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "00000.png").write_text("precious")
    line = complaint(capsys, 1, "generate", folder / "artifact", "--out", tmp_path)
    assert "exists and is not empty; choose another directory or remove it" in line
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def test_bad_input_is_refused_by_each_stage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "out"]
    nothing = tmp_path / "nothing"
    recording = ["--calibration", folder / "calibration"]
    for command, message in [
        (["calibrate", folder / "artifact" / "scheduler", *out], "scheduler"),
        (["compress", nothing, *recording, "--recipe", "w8a8", *out], "does not exist"),
        (["compress", folder / "pipeline", "--calibration", nothing, "--recipe", "w8a8", *out], "nothing"),
        (["deploy", folder / "pipeline", *out], "is not a compressed pipeline"),
        (["verify", folder / "pipeline"], "is not an artifact"),
        (["inspect", nothing], "nothing"),
    ]:
        assert message in complaint(capsys, 1, *command)
    assert list(tmp_path.iterdir()) == []


def test_deploy_in_shards(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["deploy", folder / "compressed", "--out", tmp_path / "artifact"]
    line = complaint(capsys, 2, *command, "--max-shard-size", "some")
    assert "--max-shard-size some; allowed are a number of bytes above zero" in line
    assert list(tmp_path.iterdir()) == []
    answer(capsys, *command, "--max-shard-size", "50KB")
    names = sorted(path.name for path in (tmp_path / "artifact" / "unet").glob("*.safetensors"))
    assert names[0] == f"errata-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 1
    whole, shards = (
        {row["layer"]: row["bytes"] for row in answer(capsys, "inspect", root)["layers"]}
        for root in (folder / "artifact", tmp_path / "artifact")
    )
    assert shards == whole


def test_an_engine_is_written_under_both_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    command = [f"{folder}/artifact", "--out", f"{tmp_path}/engine"]
    assert cli.main(["export-onnx", *command]) == 0
    said = capsys.readouterr()
    assert f"engine: {tmp_path}/engine, " in said.out
    assert said.err == ""
    # Making one takes seconds: the old name is given the one that is there.
    asked: list[tuple[Any, Any]] = []

    def remember(*given: Any, **options: Any) -> Path:
        asked.append((given, options))
        return tmp_path / "engine"

    monkeypatch.setattr(engines, "export_onnx", remember)
    assert cli.main(["export", *command]) == 0
    old = capsys.readouterr()
    assert old.out == said.out
    assert old.err == "errata: `errata export` is now called `errata export-onnx`\n"
    assert [[str(each) for each in given] for given, _ in asked] == [[command[0], command[2]]]


def test_verify_refuses_a_truncated_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "artifact", tmp_path / "artifact")
    weights = next((tmp_path / "artifact" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert weights.name in complaint(capsys, 1, "verify", tmp_path / "artifact")


def test_a_recipe_may_be_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from errata.compress import Recipe

    (tmp_path / "recipe.yaml").write_text(Recipe.named("w8a8").to_yaml())
    command = ["compress", folder / "pipeline", "--calibration", folder / "calibration"]
    made = answer(capsys, *command, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert made["recipe"] == "w8a8"


class Quarters(nn.Module):
    """Features: the mean of each quarter of the image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_report_measures_each_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata import report
    from errata.correct import IEC, Plan, Refresh

    statistics = report.FeatureStatistics(0.5 * torch.ones(4).double(), 0.01 * torch.eye(4).double(), 100)
    reference = report.Reference(Quarters(), statistics, "grey cards", "quarters")
    monkeypatch.setattr(report.Reference, "open", lambda source, network: reference)
    file = tmp_path / "plan.json"
    (Plan(IEC(), "0") + Plan(Refresh(), "1")).save(file)
    options = ["--reference", "cards", "--baseline", folder / "pipeline", "--samples", 6, "--batch-size", 3]
    places = ["--at", "0", "--at", "full", "--plan", file]
    found = answer(
        capsys, "report", folder / "artifact", *options, *places, "--iterations", 2, "--out", tmp_path / "out"
    )
    asked = [row for row in found["rows"] if row["role"] != "equal compute"]
    assert [(row["artifact"], row["plan"], row["steps"]) for row in asked] == [
        ("float", "none", "none"),
        ("w8a8+deepcache-2", "none", "none"),
        ("w8a8+deepcache-2", str(file), "0 + 1"),
        ("w8a8+deepcache-2", "0", "0"),
        ("w8a8+deepcache-2", "full", "full"),
    ]
    assert len(asked) < len(found["rows"])
    assert asked[2]["evaluations"] == {"full": 4, "cached": 1}
    command = f"--plan {file} --at 0 --at full --iterations 2"
    assert command in found["protocol"]["command"]
    assert Path(found["report"]).is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == found["rows"]


def test_a_plan_is_made_and_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    command = ["plan", folder / "artifact", "--max-overhead", 5, "--samples", 4, "--batch-size", 2]
    found = answer(capsys, *command, "--out", file)
    assert found["plan"] == json.loads(file.read_text())["plan"]
    assert found["plan"]["method"]["type"] == "Refresh"  # a run without the cache agrees with itself
    assert (found["plan"]["expected"]["value"], found["plan"]["expected"]["seed"]) == (0, 4)
    made = answer(
        capsys, "generate", folder / "artifact", "--plan", file, "--images", 1, "--out", tmp_path / "images"
    )
    assert made["evaluations_per_image"] == {"full": STEPS, "cached": 0}
    options = ["--reference", "embedded", "--samples", 2, "--out", tmp_path / "report"]
    line = complaint(capsys, 1, "report", folder / "artifact", "--plan", folder / "artifact", *options)
    assert "is a directory; give a file that `errata plan` wrote" in line


def test_a_plan_says_what_to_expect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "plan",
        folder / "artifact",
        "--max-overhead",
        "500%",
        "--samples",
        4,
        "--out",
        tmp_path / "plan.json",
    ]
    assert cli.main([*map(str, command)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "Refresh() at all"
    assert second.startswith("0 instead of ")
    assert "RMS difference of pixels to a cache-free run of the same artifact" in second
    assert third == f"plan: {tmp_path / 'plan.json'}"


def test_a_plan_compares_images_in_the_features_of_a_network(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact draws 8x8 images, which the network of the built-in model cannot take."""
    from errata import report

    (tmp_path / "quarter_features.py").write_text(
        "from torch import nn\n"
        "def quarters():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    real = report.Reference(Quarters(), report.statistics(torch.rand(30, 4)), "noise", "quarters")
    real.save(tmp_path / "real.npz")
    command = ["plan", folder / "artifact", "--reference", tmp_path / "real.npz", "--samples", 6]
    options = ["--max-overhead", "20%", "--out", tmp_path / "plan.json"]
    line = complaint(capsys, 1, *command, *options)
    assert "real.npz` has dimension 4, feature network `digit-features` gives 64" in line
    assert line.endswith("pass the network that it was made with as --features")
    found = answer(capsys, *command, *options, "--features", "quarter_features:quarters")
    assert found["plan"]["expected"]["overhead"] <= 0.2
    assert json.loads((tmp_path / "plan.json").read_text())["plan"] == found["plan"]


def test_a_plan_is_for_its_artifact_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from errata.correct import IEC, Plan

    Plan(IEC(), "0", artifact="0" * 64).save(tmp_path / "plan.json")
    options = ["--plan", tmp_path / "plan.json", "--out", tmp_path / "out"]
    for command in (["generate"], ["report", "--reference", "embedded"]):
        line = complaint(capsys, 1, command[0], folder / "artifact", *command[1:], *options)
        assert "artifact" in line
        assert "000000" in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plan_refuses_an_output_in_use_before_anything_is_sampled(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("precious")
    for place, message in (
        ("plan.json", "exists; choose another file"),
        ("a/b", "is not a directory; create"),
    ):
        assert message in complaint(capsys, 1, "plan", tmp_path / "no artifact", "--out", tmp_path / place)
    assert (tmp_path / "plan.json").read_text() == "precious"


def test_an_uncached_artifact_needs_a_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--calibration", folder / "calibration", "--recipe", "w8a8"]
    answer(capsys, "compress", folder / "pipeline", *recipe, "--out", tmp_path / "compressed")
    answer(capsys, "deploy", tmp_path / "compressed", "--out", tmp_path / "artifact")
    line = complaint(capsys, 1, "plan", tmp_path / "artifact", "--out", tmp_path / "plan.json")
    assert "has no cache; give real images, with `errata plan --reference" in line
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        (["second-order", "--weight", "1"], {"full": 4, "cached": 2}),
        (["forecast", "--order", "1", "--basis", "newton"], {"full": 2, "cached": 2}),
        (["lookahead", "--position", "1"], {"full": 4, "cached": 2}),
        (["refresh", "--at", "1"], {"full": 3, "cached": 1}),
        (["refresh@1 + forecast + hindsight"], {"full": 3, "cached": 1}),
        (["iec@0+refresh", "--at", "3"], {"full": 4, "cached": 1}),
        (["hindsight", "--gain", "0.5"], {"full": 2, "cached": 2}),
        (["lookahead+hindsight", "--position", "0.5", "--gain", "0.5"], {"full": 4, "cached": 2}),
        (["epsilon-scaling", "--scale", "1.2", "--slope", "0.1"], {"full": 2, "cached": 2}),
        (["langevin", "--snr", "0.2", "--iterations", "2"], {"full": 8, "cached": 2}),
    ],
)
def test_every_method_changes_images_at_its_price(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    evaluations: dict[str, float],
) -> None:
    command = ["generate", folder / "artifact", "--images", 2]
    answer(capsys, *command, "--out", tmp_path / "plain")
    made = answer(capsys, *command, "--out", tmp_path / "corrected", "--correct", *options)
    assert made["evaluations_per_image"] == evaluations
    if options[0] != "forecast":  # it has one step to change here, the last, by less than a grey level
        assert abs(pixels(tmp_path / "plain/grid.png") - pixels(tmp_path / "corrected/grid.png")).max() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("refresh@second", "'second' is not a selection of steps"),
        ("refresh@1+forcast", "unknown method 'forcast'"),
    ],
)
def test_steps_of_a_method_are_checked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    options = ["--out", tmp_path / "out", "--correct", given]
    assert message in complaint(capsys, 2, "generate", folder / "artifact", *options)
    assert not (tmp_path / "out").exists()


def pictures(folder: Path, *sizes: int) -> Path:
    """Grey noise as PNG files of these sides."""
    folder.mkdir()
    for index, size in enumerate(sizes):
        noise = np.random.default_rng(index).integers(0, 255, (size, size), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03d}.png")
    return folder


def test_statistics_are_saved_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    reference = pictures(tmp_path / "real", *[16] * 70)
    stats = tmp_path / "real.npz"
    said = answer(capsys, "report", "--save-stats", stats, "--reference", reference)
    assert said == {"statistics": str(stats), "images": 70, "features": 64}
    with np.load(stats) as stored:
        assert (stored["mu"].shape, stored["sigma"].shape, int(stored["count"])) == ((64,), (64, 64), 70)
        assert stored["features"].shape == (70, 64)
    line = complaint(capsys, 1, "report", "--save-stats", stats, "--reference", reference)
    assert "real.npz` exists; choose another file or remove it" in line
    gone = tmp_path / "nowhere" / "real.npz"
    line = complaint(capsys, 1, "report", "--save-stats", gone, "--reference", reference)
    assert "its parent is not a directory; create it" in line


def test_bad_references_are_refused_before_any_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr("errata.correct.sampling._timed", refuse)
    out = tmp_path / "out"

    def said_of(reference: Path, *options: str) -> str:
        command = ["report", folder / "artifact", "--reference", reference, "--out", out, *options]
        line = complaint(capsys, 1, *command)
        assert not out.exists()
        return line

    (tmp_path / "empty").mkdir()
    assert "holds 0 PNG or JPEG files; at least 2 are needed" in said_of(tmp_path / "empty")
    mixed = pictures(tmp_path / "mixed", 16, 16, 12)
    assert "002.png` is 12x12" in said_of(mixed)
    assert "a reference needs images of one size" in said_of(mixed)
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "other.npz` has dimension 5, feature network `digit-features` gives 64" in said_of(
        tmp_path / "other.npz"
    )
    np.savez(tmp_path / "fits.npz", mu=np.zeros(64), sigma=np.eye(64))
    # The artifact draws 8x8 images, which these features cannot take.
    assert "digit-features takes (B, 1, 16, 16)" in said_of(tmp_path / "fits.npz")
    assert "leaves nothing to correct" in said_of(tmp_path / "fits.npz", "--at", "1")


def test_report_refuses_an_unknown_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--reference", tmp_path / "nowhere", "--out", tmp_path / "out"]
    assert "nowhere" in complaint(capsys, 1, "report", folder / "artifact", *options)
    assert list(tmp_path.iterdir()) == []
