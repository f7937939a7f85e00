"""Taking codes and ranges over gives what making them anew gives, and only from the same quantization."""

import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from diffusers import DDIMPipeline
from plain_outputs import plain_outputs

from errata import calibration, compress
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.errors import RecipeError

RECIPE = "w8a8+cachequant-3"


@pytest.fixture(scope="module", autouse=True)
def _outputs_are_fitted_anew_in_any_case() -> Iterator[None]:
    with plain_outputs():
        yield


@pytest.fixture(scope="module")
def anew(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The result that reuses nothing."""
    return compress.apply(
        tiny_pipeline, tiny_calibration, RECIPE, tmp_path_factory.mktemp("anew") / "out"
    ).path


@pytest.mark.parametrize("earlier", ["w8a8", "w8a8+cachequant-2"])
def test_the_result_has_the_same_bytes(
    earlier: str,
    anew: Path,
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tiny_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    source = tiny_compressed(earlier)
    compress.apply(tiny_pipeline, tiny_calibration, RECIPE, tmp_path / "reused", reuse=source)
    for name in ("compressed.json", "quantizers.safetensors"):
        assert filecmp.cmp(tmp_path / "reused" / name, anew / name, shallow=False)
    assert not filecmp.cmp(source.path / "compressed.json", anew / "compressed.json", shallow=False)


def test_a_cache_is_fitted_on_the_equalized_network(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tiny_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    """Equalization keeps the float function but for its last bits, which a fit shows."""
    recipe, source = "w8a8+cachequant-3:equalization=true", tiny_compressed("w8a8:equalization=true")
    compress.apply(tiny_pipeline, tiny_calibration, recipe, tmp_path / "anew")
    compress.apply(tiny_pipeline, tiny_calibration, recipe, tmp_path / "reused", reuse=source)
    anew, reused = (tmp_path / name / "quantizers.safetensors" for name in ("anew", "reused"))
    assert filecmp.cmp(anew, reused, shallow=False)


def test_nothing_is_observed_again(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tiny_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny_compressed("w8a8")
    monkeypatch.setattr("errata.compress.jobs.work.observe_ranges", None)
    monkeypatch.setattr("errata.compress.jobs.work.quantize_weights", None)
    compress.apply(tiny_pipeline, tiny_calibration, "w8a8+deepcache-2", tmp_path / "out", reuse=source)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("w4a8", "quantization.weight_bits was 8, is now 4"),
        ("w8a8:bias_correction=true", "quantization.bias_correction was False, is now True"),
        ("deepcache-2", "one of them quantizes nothing"),
    ],
)
def test_another_quantization_is_refused(
    recipe: str,
    message: str,
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tiny_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress.apply(
            tiny_pipeline, tiny_calibration, recipe, tmp_path / "out", reuse=tiny_compressed("w8a8")
        )
    assert list(tmp_path.iterdir()) == []


def test_other_trajectories_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_compressed: Callable[[str], CompressedPipeline], tmp_path: Path
) -> None:
    other = calibration.collect(
        tiny_pipeline, tmp_path / "set", num_inference_steps=6, num_samples=8, batch_size=4, seed=100
    )
    with pytest.raises(RecipeError, match="data_sha256 was"):
        compress.apply(tiny_pipeline, other, "w8a8", tmp_path / "out", reuse=tiny_compressed("w8a8"))


def test_what_is_no_compressed_pipeline_is_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=r"errata\.compress\.load"):
        compress.apply(tiny_pipeline, tiny_calibration, "w8a8", tmp_path / "out", reuse=tmp_path)  # type: ignore[arg-type]
