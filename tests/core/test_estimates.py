"""What an estimate says, and what it refuses."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from errata.errors import CalibrationError, RecipeError
from errata.estimates import Estimate, Need, disk_need, size_text, stored_size
from errata.presets import LAPTOP, find_preset


def estimate(*needs: Need) -> Estimate:
    return Estimate(
        work="recording 4 samples",
        seconds=7200,
        disk_bytes=1_250_000,
        memory_bytes=2_500_000_000,
        call_seconds=0.25,
        call_samples=2,
        needs=needs,
    )


def test_the_line_has_time_disk_memory_and_what_was_timed() -> None:
    assert estimate().text() == (
        "recording 4 samples: about 2.0 h, 1.25 MB on disk, 2.5 GB of memory at peak "
        "(one call of the network with 2 samples takes 250 ms)"
    )


def test_what_fits_and_what_is_unknown_is_not_refused() -> None:
    enough = Need(what="memory", needed=10, available=10, way_out="lower it")
    unknown = Need(what="memory", needed=10, available=None, way_out="lower it")
    estimate(enough, unknown).check(error=CalibrationError)


def test_what_does_not_fit_is_refused_with_figures_and_a_way_out() -> None:
    need = Need(what="memory", needed=2_000_000, available=1_000_000, way_out="lower `batch_size`")
    with pytest.raises(
        RecipeError,
        match=r"not enough memory: recording 4 samples needs 2 MB more, and 1 MB are available; lower `batch",
    ):
        estimate(need).check(error=RecipeError)


def test_disk_space_is_that_of_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=5)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    need = disk_need(tmp_path / "runs" / "out", 6, way_out="choose another")
    assert (need.available, need.fits, asked) == (5, False, [tmp_path])
    assert str(tmp_path) in need.what


@pytest.mark.parametrize(
    ("size", "text"),
    [(10, "0.0 kB"), (1234, "1.2 kB"), (13_000_000, "13 MB"), (999_000_000, "999 MB"), (1.25e9, "1.25 GB")],
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert size_text(size) == text


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    assert (stored_size(tmp_path), stored_size(tmp_path / "none")) == (5, 0)


def test_a_preset_stays_within_its_bounds() -> None:
    assert [LAPTOP.samples(usual) for usual in (512, 64, 16, 8)] == [64, 32, 8, 8]
    assert [LAPTOP.batch_size(usual) for usual in (64, 8, 4, 1)] == [8, 1, 1, 1]


def test_unknown_presets_are_refused() -> None:
    assert find_preset(None, error=CalibrationError) is None
    with pytest.raises(CalibrationError, match=r"unknown preset 'desk'; allowed are: laptop, or none"):
        find_preset("desk", error=CalibrationError)
