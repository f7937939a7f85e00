import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from errata.errors import ReportError
from errata.report.request import batch_names
from errata.report.store import (
    BatchFacts,
    BatchMeasured,
    MeasurementStore,
    Settings,
    open_measurements,
    read_settings,
)

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "batch_size": 2,
    "network": "a" * 64,
    "reference": "b" * 64,
    "paired_with": "uncorrected",
    "scores": ("psnr", "ssim"),
    "shown": 3,
}


def test_a_folder_is_opened_again_with_the_same_settings(tmp_path: Path) -> None:
    with open_measurements(tmp_path / "out", Settings(**SETTINGS)) as journal:
        folder = journal.path
    with open_measurements(tmp_path / "out", Settings(**SETTINGS)) as journal:
        assert journal.path == folder
    assert read_settings(folder) == SETTINGS | {"scores": ["psnr", "ssim"]}


def test_the_settings_of_earlier_releases_are_the_same_bytes(tmp_path: Path) -> None:
    text = (
        f'{{"batch_size":2,"network":"{"a" * 64}","paired_with":"uncorrected","reference":"{"b" * 64}",'
        '"schema":"errata-measurements/1","scores":["psnr","ssim"],"seed":0,"shown":3}'
    )
    with open_measurements(tmp_path / "out", Settings(**SETTINGS)) as journal:
        file = journal.path / "settings.json"
    assert file.relative_to(tmp_path) == Path("out/measurements/settings.json")
    assert file.read_text(encoding="utf-8").rstrip() == text


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_counts(name: str, tmp_path: Path) -> None:
    with open_measurements(tmp_path / "out", Settings(**SETTINGS)):
        pass
    other = 9 if isinstance(SETTINGS[name], int) else ("psnr",) if name == "scores" else "c" * 64
    named = r"scores\[1\]" if name == "scores" else name
    with pytest.raises(
        ReportError, match=f"of another request: .*{named} was .*, is now .*; repeat that request to"
    ):
        open_measurements(tmp_path / "out", Settings(**{**SETTINGS, name: other})).__enter__()


def test_other_contents_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ReportError, match="exists and is not empty"):
        open_measurements(tmp_path, Settings(**SETTINGS)).__enter__()
    with pytest.raises(ReportError, match="is not a directory; create it first"):
        open_measurements(tmp_path / "no" / "where", Settings(**SETTINGS)).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ReportError, match="holds no measurements of `errata report`"):
        read_settings(tmp_path)
    (tmp_path / "settings.json").write_text('{"schema": "errata-measurements/9"}', encoding="utf-8")
    with pytest.raises(ReportError, match="has the format 'errata-measurements/9'; this release"):
        read_settings(tmp_path)


def test_jobs_that_begin_at_the_same_time_share_a_folder(tmp_path: Path) -> None:
    gate = threading.Barrier(8)

    def begin(_: int) -> Path:
        gate.wait(timeout=60)
        with open_measurements(tmp_path / "out", Settings(**SETTINGS)) as journal:
            return journal.path

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(begin, range(8))) == {tmp_path / "out" / "measurements"}
    assert read_settings(tmp_path / "out" / "measurements")["seed"] == 0


def test_a_kill_before_the_settings_were_written_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "measurements"
    folder.mkdir(parents=True)
    for name in (".lock", "settings.json.tmp"):
        (folder / name).touch()
    with open_measurements(tmp_path / "out", Settings(**SETTINGS)):
        assert read_settings(folder)["seed"] == 0
    (folder / "settings.json").rename(folder / "thesis.json")
    with pytest.raises(ReportError, match=r"other files than those of measurements \(thesis.json\); move"):
        open_measurements(tmp_path / "out", Settings(**SETTINGS)).__enter__()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ReportError, match="exists and is not empty"):
        open_measurements(tmp_path / "out", Settings(**SETTINGS)).__enter__()


def test_folders_that_are_only_read_are_not_written_to(tmp_path: Path) -> None:
    store = MeasurementStore([tmp_path], batches=[range(1)], names=["000000"])
    facts = BatchFacts(seconds=1, took=1, base={}, extra={}, cost={}, peak_bytes=None, joules=None)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    measured = BatchMeasured(features=torch.zeros(1, 2), logits=None, scores={}, shown=images, facts=facts)
    with pytest.raises(ValueError, match="only read; make the store from a journal"):
        store.write("row", 0, measured)
    assert list(tmp_path.iterdir()) == []


def names(**arguments: Any) -> tuple[str, ...]:
    return batch_names(lambda indices: arguments, [range(2), range(2, 4)])


def test_whatever_the_pipelines_are_called_with_names_a_batch() -> None:
    picture = Image.new("RGB", (2, 2), "red")
    kinds: list[dict[str, Any]] = [
        {"batch_size": 2},
        {"prompt": ["a", "b"]},
        {"prompt": ["a", "c"]},
        {"prompt": ["a", "b"], "guidance_scale": 2.0},
        {"image": [picture]},
        {"image": [Image.new("RGB", (2, 2), "blue")]},
        {"latents": torch.zeros(2)},
        {"latents": torch.ones(2)},
    ]
    made = [names(**kind) for kind in kinds]
    assert len({name for pair in made for name in pair}) == 2 * len(kinds)
    assert made == [names(**kind) for kind in kinds]
    assert names(batch_size=2)[0].startswith("000000-")
    with pytest.raises(ReportError, match="argument 'callback' is a function, which cannot be compared"):
        names(callback=names)
