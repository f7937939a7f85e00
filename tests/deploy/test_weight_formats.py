"""Every weight format, from a recipe's name to an artifact that runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errata import compress, deploy
from errata.calibration import CalibrationSet
from errata.canonical_json import digest, dumps, file_digest, loads_strict
from errata.compress import CompressedPipeline
from errata.compress.jobs.dry_run import tensor_bytes
from errata.deploy.cpu import int8
from errata.errors import ArtifactCorruptError, ArtifactError
from errata.runtime.weight_formats import weight_bits, weight_format

Make = Callable[[str], CompressedPipeline]
Artifact = Callable[[str], Path]
LAYER = "mid_block.resnets.0.conv1"
DENOISER = "unet/errata.safetensors"
RECIPES = [f"w{bits}a8" for bits in weight_bits()]


def images(pipeline: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    output = pipeline(batch_size=4, generator=generator, output_type="np")  # type: ignore[operator]
    return torch.as_tensor(output.images)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_artifact_computes_what_was_simulated(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact
) -> None:
    deployed = deploy.load(tiny_artifact(recipe), backend="reference")
    assert deployed.manifest.recipe.name == recipe
    assert (images(deployed) - images(tiny_compressed(recipe))).abs().max() <= 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_codes_are_those_of_the_format(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact
) -> None:
    compression = tiny_compressed(recipe).compression
    stored = load_file(tiny_artifact(recipe) / DENOISER)
    for layer in compression.scheme.layers:
        codes = compression.table[f"{layer.name}.codes"]
        stored_as = weight_format(layer.weight_bits)
        assert int(codes.abs().max()) <= stored_as.limit
        assert stored[f"{layer.name}.codes"].nbytes == stored_as.stored_bytes(codes.shape)
        assert torch.equal(stored_as.unpack(stored[f"{layer.name}.codes"], codes.shape), codes)
    sizes = tensor_bytes(
        tiny_compressed(recipe).float_pipe.unet, compression.scheme, num_steps=compression.schedule.num_steps
    )
    assert sum(sizes.values()) == sum(value.nbytes for value in stored.values())


def test_fewer_bits_are_smaller_and_worse(
    tiny_compressed: Make, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    x = next(tiny_calibration.batches(2)).sample
    simulated = tiny_compressed("w8a8")
    with torch.no_grad():
        exact = simulated.float_pipe.unet(x, simulated.denoiser.timesteps[2]).sample
    errors = {
        recipe: float((tiny_compressed(recipe).denoiser.full(x, 2, {})[0] - exact).square().mean().sqrt())
        for recipe in RECIPES
    }
    sizes = {recipe: deploy.verify(tiny_artifact(recipe)).denoiser_bytes for recipe in RECIPES}
    assert errors["w4a8"] > 2 * errors["w6a8"] > 2 * errors["w8a8"] > 0
    assert sizes["w4a8"] < sizes["w6a8"] < sizes["w8a8"]


@pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize("backend", ["auto", "vnni", "onednn"])
def test_six_bits_run_on_int8_kernels(
    backend: str, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    path = tiny_artifact("w6a8")
    reference = deploy.load(path, backend="reference").denoiser
    try:
        deployed = deploy.load(path, backend=backend)
    except ArtifactError as error:
        pytest.skip(str(error))
    rows = [row for row in deployed.backend_report() if row.scheme == "w6a8"]
    assert rows
    if backend == "auto":
        assert any("int6 weights are unpacked to int8 at load" in row.reason for row in rows)
    x = next(tiny_calibration.batches(1)).sample
    expected = reference.full(x, 1, {})[0]
    away = (deployed.denoiser.full(x, 1, {})[0] - expected).square().mean().sqrt()
    assert away <= 0.05 * expected.square().mean().sqrt()


def test_a_mixture_of_all_widths(
    tiny_pipeline: object, tiny_calibration: CalibrationSet, tiny_compressed: Make, tmp_path: Path
) -> None:
    quantization = compress.Quantization(
        weight_bits=4, activation_bits=8, bits={"mid_block": 6, "up_blocks.0": 8}
    )
    recipe = compress.Recipe(quantization=quantization)
    mixed = compress.apply(tiny_pipeline, tiny_calibration, recipe, tmp_path / "mixed")
    artifact = deploy.deploy(mixed, tmp_path / "artifact")
    labels = {row.scheme for row in deploy.load(artifact, backend="reference").backend_report()}
    assert {"w4a8", "w6a8", "w8a8"} <= labels


def test_learned_rounding_stays_within_six_bits(
    tiny_pipeline: object, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    recipe = "w6a8-learned:iterations=2,samples=4,batch_size=4"
    learned = compress.apply(tiny_pipeline, tiny_calibration, recipe, tmp_path / "learned")
    codes = learned.compression.table[f"{LAYER}.codes"]
    assert 8 < int(codes.abs().max()) <= 31
    assert deploy.verify(deploy.deploy(learned, tmp_path / "artifact")).recipe.name == recipe


def altered(root: Path, codes: torch.Tensor) -> Path:
    """The artifact with other codes of one layer; every digest is right."""
    tensors = load_file(root / DENOISER)
    tensors[f"{LAYER}.codes"] = codes
    save_file(tensors, root / DENOISER)
    value = loads_strict((root / "errata.json").read_bytes())
    value.pop("manifest_sha256")
    value["files"][DENOISER] = {
        "bytes": (root / DENOISER).stat().st_size,
        "sha256": file_digest(root / DENOISER),
    }
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))
    return root


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1728,), 0b00100000, dtype=torch.uint8), "holds a code outside the symmetric range"),
        (torch.zeros(1729, dtype=torch.uint8), r"is torch.uint8 \(1729,\), the scheme w6a8 says"),
        (torch.zeros(1152, dtype=torch.uint8), r"is torch.uint8 \(1152,\), the scheme w6a8 says"),
        (torch.zeros(0, dtype=torch.uint8), r"is torch.uint8 \(0,\), the scheme w6a8 says"),
        (torch.zeros(1728, dtype=torch.int8), r"is torch.int8 \(1728,\), the scheme w6a8 says"),
        (torch.zeros(16, 16, 3, 3, dtype=torch.int8), "is torch.int8 .*, the scheme w6a8 says"),
    ],
)
def test_hostile_codes_of_six_bits_are_refused(
    codes: torch.Tensor, message: str, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    root = altered(Path(shutil.copytree(tiny_artifact("w6a8"), tmp_path / "artifact")), codes)
    for check in (deploy.verify, deploy.load):
        with pytest.raises(ArtifactCorruptError, match=f"'{LAYER}.codes' {message}"):
            check(root)
