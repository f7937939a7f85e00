"""A calibrated output does what a sheet with its numbers would, on every backend; format 1 still loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_files import change_tensors
from sheets import MEASURED, made_up_sheet
from torch import Tensor

from errata import deploy
from errata.canonical_json import digest, dumps
from errata.correct import Plan, Sheet, wrap
from errata.correct.sheets.fitted_maps import FittedMaps
from errata.deploy import DeployedPipeline
from errata.deploy.manifest import FIRST_FORMAT, FORMAT
from errata.errors import ArtifactCorruptError
from errata.runtime.output_map import OUTPUT_MAP

Artifact = Callable[[str], Path]
MATRIX, BIAS = OUTPUT_MAP
STEPS = 6
RECIPES = ["w8a8", "w8a8+deepcache-3", "w4a8+cachequant-2"]


def made_up_numbers() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    matrix = 1 + 0.2 * torch.randn(STEPS, 1, 1, generator=generator)
    return matrix, 0.2 * torch.randn(STEPS, 1, generator=generator)


@pytest.fixture(scope="module")
def mapped(tiny_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`mapped("w8a8")`: that artifact with made-up numbers in its output map."""
    root = tmp_path_factory.mktemp("mapped")

    def make(recipe: str) -> Path:
        path = root / recipe
        if not path.exists():
            shutil.copytree(tiny_artifact(recipe), path)
            matrix, bias = made_up_numbers()
            change_tensors(path, lambda tensors: tensors.update({MATRIX: matrix, BIAS: bias}))
        return path

    return make


@pytest.fixture
def identical(tiny_artifact: Artifact, tmp_path: Path) -> Artifact:
    """That artifact with an output map that changes nothing."""

    def make(recipe: str) -> Path:
        path = Path(shutil.copytree(tiny_artifact(recipe), tmp_path / recipe))
        numbers = {MATRIX: torch.ones(STEPS, 1, 1), BIAS: torch.zeros(STEPS, 1)}
        change_tensors(path, lambda tensors: tensors.update(numbers))
        return path

    return make


def sheet_of(deployed: DeployedPipeline) -> Sheet:
    matrix, bias = made_up_numbers()
    kinds = 2 if deployed.schedule.has_cache else 1
    maps = FittedMaps(
        call=torch.arange(STEPS).repeat(kinds),
        kind=torch.arange(kinds, dtype=torch.uint8).repeat_interleave(STEPS),
        matrix=matrix.repeat(kinds, 1, 1),
        bias=bias.repeat(kinds, 1),
    )
    return Sheet(maps=maps, facts=made_up_sheet(deployed, measured=MEASURED).facts)


def images(pipeline: Callable[..., object]) -> Tensor:
    output = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), output_type="np")
    return torch.as_tensor(output.images)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["reference", "auto", "onednn"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_equals_a_sheet_on_every_backend(
    recipe: str, backend: str, mapped: Artifact, identical: Artifact
) -> None:
    plain = deploy.load(identical(recipe), backend=backend)
    found = images(deploy.load(mapped(recipe), backend=backend))
    assert torch.allclose(found, images(wrap(plain, Plan(sheet_of(plain)))), atol=1e-5)
    assert float((found - images(plain)).abs().max()) > 1e-3


def test_every_call_has_its_own_numbers(mapped: Artifact, identical: Artifact) -> None:
    with_map, without = (deploy.load(make("w8a8+deepcache-3")).denoiser for make in (mapped, identical))
    matrix, bias = made_up_numbers()
    x = torch.randn(2, 1, 8, 8)
    for step in range(STEPS):
        plain, feature = without.full(x, step, {})
        assert feature is not None
        cached = without.cached(x, step, {}, feature)
        for found, inner in (
            (with_map.full(x, step, {})[0], plain),
            (with_map.cached(x, step, {}, feature), cached),
            (with_map.cached(x, step, {}, feature, is_extrapolated=True), cached),
        ):
            assert torch.allclose(found, matrix[step] * inner + bias[step], atol=1e-5)
        other = (step + 1) % STEPS
        assert not torch.allclose(found, matrix[other] * inner + bias[other], atol=1e-4)


def test_at_other_steps_a_call_has_the_numbers_of_the_nearest_one(
    mapped: Artifact, identical: Artifact
) -> None:
    with pytest.warns(UserWarning, match="sampling with 3 steps"):
        with_map, without = (
            deploy.load(make("w8a8"), on_mismatch="nearest").at_steps(3) for make in (mapped, identical)
        )
    matrix, bias = made_up_numbers()
    times = deploy.load(mapped("w8a8")).denoiser.timesteps
    x = torch.randn(2, 1, 8, 8)
    for step, time in enumerate(with_map.denoiser.timesteps):
        nearest = min(range(STEPS), key=lambda call: abs(times[call] - time))
        expected = matrix[nearest] * without.denoiser.full(x, step, {})[0] + bias[nearest]
        assert torch.allclose(with_map.denoiser.full(x, step, {})[0], expected, atol=1e-5)


def as_first_format(root: Path, change: Callable[[dict[str, object]], object] = lambda value: None) -> None:
    """Rewrite an artifact without a calibrated output as an earlier release wrote it."""
    value = json.loads((root / "errata.json").read_text())
    for key in ("manifest_sha256", "calibrated_output"):
        del value[key]
    del value["recipe"]["calibrated_output"]
    value["format"] = FIRST_FORMAT
    change(value)
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))


@pytest.mark.parametrize("recipe", ["w4a8:calibrated_output=false", "deepcache-3:calibrated_output=false"])
def test_the_first_format_still_loads(recipe: str, tiny_artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "first"
    shutil.copytree(tiny_artifact(recipe), path)
    as_first_format(path)
    stated = json.loads((path / "errata.json").read_text())["manifest_sha256"]
    deployed, second = deploy.load(path), deploy.load(tiny_artifact(recipe))
    assert (deployed.manifest.format, second.manifest.format) == (FIRST_FORMAT, FORMAT)
    assert deployed.manifest.sha256 == stated
    assert deployed.manifest.recipe.name == recipe
    assert torch.equal(images(deployed), images(second))


def test_the_first_format_has_no_calibrated_output(tiny_artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "first"
    shutil.copytree(tiny_artifact("w4a8"), path)
    as_first_format(path)
    with pytest.raises(ArtifactCorruptError, match="scheme does not fit the recipe"):
        deploy.verify(path)
    shutil.rmtree(path)
    shutil.copytree(tiny_artifact("w4a8:calibrated_output=false"), path)
    as_first_format(path, lambda value: value["recipe"].update(calibrated_output=True))  # type: ignore[attr-defined]
    with pytest.raises(ArtifactCorruptError, match="has no key 'calibrated_output'"):
        deploy.verify(path)


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({"images": 16}, "does not have exactly the keys"),
        ({**MEASURED.to_json(), "images": -1}, "images of a measured change is -1"),
        ({**MEASURED.to_json(), "low": "0"}, "low of a measured change is 0"),
        ({**MEASURED.to_json(), "psnr": 31}, "would be written as"),
        (3, "does not have exactly the keys"),
    ],
)
def test_a_malformed_measurement_is_refused(
    measured: object, reason: str, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_artifact("w8a8"), tmp_path / "artifact"))
    value = json.loads((path / "errata.json").read_text())
    del value["manifest_sha256"]
    value["calibrated_output"] = measured
    (path / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))
    with pytest.raises(ArtifactCorruptError, match=reason):
        deploy.verify(path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (BIAS, lambda value: value.fill_(torch.nan), "NaN or infinity"),
        (MATRIX, lambda value: value[:-1].clone(), "the scheme w8a8 says"),
        (MATRIX, lambda value: value.double(), "the scheme w8a8 says"),
    ],
)
def test_damaged_numbers_are_refused(
    name: str, change: Callable[[Tensor], Tensor], reason: str, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_artifact("w8a8"), tmp_path / "artifact"))
    change_tensors(path, lambda tensors: tensors.update({name: change(tensors[name].clone())}))
    with pytest.raises(ArtifactCorruptError, match=reason):
        deploy.verify(path)
