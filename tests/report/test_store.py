from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from errata.errors import ReportError
from errata.report.request import batch_names
from errata.report.store import Settings, check_same, open_folder, read_settings

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
    folder = open_folder(tmp_path / "out", Settings(**SETTINGS))
    assert open_folder(tmp_path / "out", Settings(**SETTINGS)) == folder
    assert read_settings(folder)["scores"] == ["psnr", "ssim"]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_counts(name: str, tmp_path: Path) -> None:
    open_folder(tmp_path / "out", Settings(**SETTINGS))
    other = 9 if isinstance(SETTINGS[name], int) else ("psnr",) if name == "scores" else "c" * 64
    with pytest.raises(ReportError, match=f"was measured with {name} .*, now it is .*; give the same"):
        open_folder(tmp_path / "out", Settings(**{**SETTINGS, name: other}))


def test_other_contents_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ReportError, match="exists and is not empty"):
        open_folder(tmp_path, Settings(**SETTINGS))
    with pytest.raises(ReportError, match="is not a directory; create it first"):
        open_folder(tmp_path / "no" / "where", Settings(**SETTINGS))
    with pytest.raises(ReportError, match="holds no measurements of `errata report`"):
        read_settings(tmp_path)
    (tmp_path / "settings.json").write_text('{"schema": "errata-measurements/9"}', encoding="utf-8")
    with pytest.raises(ReportError, match="has schema 'errata-measurements/9'; this release reads"):
        read_settings(tmp_path)
    check_same({"seed": 1}, {"seed": 1}, tmp_path)


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
