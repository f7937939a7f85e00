"""The recipes of the IEC paper: one command takes a row of each family from calibration to its table."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from errata.report.store import MeasurementStore

LoadModule = Callable[[str, Path], ModuleType]
ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "paper"
# One row of each family, with its stand-in and steps enough for its cache to have two groups.
FAMILIES = {
    "ddim": ("ddim", 11, "table5", "cifar10-deepcache-10-iec-1-10", "cifar10-deepcache-10-float"),
    "latent": ("ldm unconditional", 6, "table3", "churches-w8a8-cachequant-5-iec", "churches-float"),
    "labels": ("ldm context kl", 11, "table4", "imagenet-w8a8-cachequant-10-iec", "imagenet-float"),
    "text": ("sd 1", 6, "table4", "coco-w8a8-cachequant-5-iec", "coco-float"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real images of noise and a file of captions."""
    root = tmp_path_factory.mktemp("paper")
    (root / "real").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(root / "real" / f"{index}.png")
    (root / "captions.txt").write_text("a b\nc\nab\nb a\n" * 3)
    return root


def _stand_in(name: str, root: Path, load_module: LoadModule) -> Path:
    """A small pipeline of that class, saved."""
    if name == "sd 1":
        pytest.importorskip("transformers")
        quality = load_module("quality_conftest", ROOT / "tests" / "core" / "quality" / "conftest.py")
        quality.save_tiny_clip(root / "tiny-clip")
    builders = load_module("small_pipelines", ROOT / "tests" / "pipelines" / "conftest.py").BUILDERS
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        pipe = builders[name]().pipe
    out = root / name.replace(" ", "-")
    pipe.save_pretrained(out)
    return out


def _arguments(pipeline: Path, root: Path, steps: int) -> list[str]:
    clip = root / "tiny-clip"
    return [
        *("--pipeline", str(pipeline), "--reference", str(root / "real"), "--work", str(root / "work")),
        *("--prompts", str(root / "captions.txt"), "--resamples", "4"),
        *(
            "--feature-network",
            "paper_stand_ins:BlockMeans",
            "--clip",
            str(clip) if clip.exists() else "none",
        ),
        *("--samples", "6", "--steps", str(steps), "--batch-size", "3", "--calibration-samples", "4"),
    ]


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_each_family_runs_from_calibration_to_its_table(
    family: str,
    paper: dict[str, Any],
    workplace: Path,
    load_module: LoadModule,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("errata.compress.quantize.step_sketch.VALUES_PER_STEP", 2048)
    name, steps, table, row, exact_row = FAMILIES[family]
    dataset = row.partition("-")[0]
    files = [str(PAPER / table / f"{one}.yaml") for one in (row, row.partition("-iec")[0], exact_row)]
    arguments = [*files, *_arguments(_stand_in(name, workplace, load_module), workplace, steps)]
    assert paper["run"].main(arguments) == 0
    page = capsys.readouterr().out
    file = next((workplace / "work" / "tables").glob(f"{table}-{dataset}*.json"))
    written = json.loads(file.read_text(encoding="utf-8"))
    corrected, plain, exact = written["rows"]
    assert corrected["published"] == paper["paper_configs"].load_rows([Path(files[0])])[0].published
    assert corrected["measured"]["overhead"] > 0
    assert plain["measured"]["overhead"] == 0
    assert exact["recipe"] is None
    assert all(each["measured"]["frechet"]["value"] > 0 for each in written["rows"])
    assert "samples is 6 instead of" in page
    assert "in block-means, no Inception network" in page
    assert f"| {corrected['published']['fid']} | " in page
    assert _measured_cells(page, "overhead computed")[0].endswith("%")
    assert _measured_cells(page, "overhead measured")[0].endswith("%")
    for metric, name in (("IS", "inception_score"), ("CLIP", "clip_score")):
        if metric.lower() in corrected["published"]:
            values = [each["measured"]["metrics"][name]["value"] for each in written["rows"]]
            cells = _measured_cells(page, f"{metric} measured")
            assert [cell.split()[0] for cell in cells] == [f"{value:.2f}" for value in values]
            assert min(values) > 0
        else:
            assert f"{metric} measured" not in page
    assert ("IS is over all images in one split" in page) == ("is" in corrected["published"])
    # All is kept: the same command measures nothing again.
    monkeypatch.setattr(paper["paper_stages"].Bench, "deployed", None)
    monkeypatch.setattr(paper["paper_stages"].Bench, "_measure_float", None)
    assert paper["run"].main(arguments) == 0
    assert capsys.readouterr().out == page


def test_what_was_measured_is_not_measured_again(
    paper: dict[str, Any],
    workplace: Path,
    load_module: LoadModule,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither after a run that was stopped, nor for further plans, nor for rows of equal compute."""
    write = MeasurementStore.write
    stops_after = [1, 4]  # within a row, and between two
    written: list[tuple[str, int]] = []

    def write_one(self: MeasurementStore, row: str, batch: int, measured: Any) -> None:
        write(self, row, batch, measured)
        written.append((row, batch))
        if len(written) in stops_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(MeasurementStore, "write", write_one)
    options = _arguments(_stand_in("ddim", workplace, load_module), workplace, 11)
    options[options.index("--work") + 1] = str(workplace / "stopped")
    files = [str(PAPER / "table5" / f"cifar10-w8a8{end}.yaml") for end in ("-float", "", "-iec-1-10")]
    stops = 0
    while True:
        try:
            assert paper["run"].main([*files, *options]) == 0
        except KeyboardInterrupt:
            stops += 1
        else:
            break
    assert stops == len(stops_after)
    assert len(written) == len(set(written)) == 6  # three rows of two batches
    further = str(PAPER / "table5" / "cifar10-w8a8-iec-all.yaml")
    assert paper["run"].main([*files, further, *options]) == 0
    assert len(written) == len(set(written)) == 8
    assert paper["run"].main([*files, further, *options, "--equal-compute"]) == 0
    assert len(written) == len(set(written)) > 8
    (file,) = (workplace / "stopped").glob("*/reports/w8a8-*/report.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["role"] for row in rows[:4]] == ["uncorrected", "plan", "plan", "equal compute"]
    *_, page = capsys.readouterr().out.split("| table |")
    assert len(_measured_cells(f"| table |{page}", "row")) == 4


def _measured_cells(page: str, heading: str) -> list[str]:
    """The column of a table in Markdown, without its heading."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    place = lines[0].index(heading)
    return [line[place] for line in lines[2:]]


def test_a_command_that_cannot_work_says_why(
    paper: dict[str, Any], workplace: Path, load_module: LoadModule, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(PAPER / "table4" / "imagenet-w8a8-cachequant-10.yaml")
    pipeline = _stand_in("ldm unconditional", workplace, load_module)
    arguments = _arguments(pipeline, workplace, 6)
    assert paper["run"].main([config, *arguments]) == 1
    assert "knows no class labels; choose another --pipeline" in capsys.readouterr().err
    assert paper["run"].main([str(PAPER / "table1" / "cifar10-w8a8.yaml"), *arguments]) == 1
    assert "is a ClassConditionalLDMPipeline; `cifar10-w8a8` needs a DDIMPipeline" in capsys.readouterr().err
    assert paper["run"].main([config, *arguments, "--reference", "nowhere.npz"]) == 1
    error = capsys.readouterr().err
    assert "`nowhere.npz`" in error
    assert "errata report --save-stats nowhere.npz --reference IMAGES --features" in error
    assert paper["run"].main([config, *arguments, "--feature-network", "eyes"]) == 1
    assert "feature network `eyes` is unknown; allowed are" in capsys.readouterr().err
    assert paper["run"].main([str(PAPER / "table4"), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 22
