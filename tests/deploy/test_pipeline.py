import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, LDMPipeline, VQModel

from errata import calibration, compress, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.deploy.cpu import int8, native
from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.reference import ReferenceLayer, WeightOnlyLayer
from errata.errors import ArtifactError, ArtifactMismatchError

Make = Callable[[str], CompressedPipeline]
Artifact = Callable[[str], Path]
RECIPES = ["w8a8", "w4a8", "w8a8+deepcache-3", "w4a8+deepcache-2:branch=1", "deepcache-3"]
# Relative RMS of a prediction to the reference's: codes on a tie round either way, later layers amplify it.
INT8_BOUND = 0.015
needs_vnni = pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions")


def images(pipeline: DeployedPipeline | CompressedPipeline, batch_size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipeline(batch_size=batch_size, generator=generator, output_type="np").images)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_backend_is_the_simulation(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    compressed, deployed = tiny_compressed(recipe), deploy.load(tiny_artifact(recipe), backend="reference")
    for step in range(6):
        x = next(tiny_calibration.batches(step)).sample
        expected, feature = compressed.denoiser.full(x, step, {})
        found, found_feature = deployed.denoiser.full(x, step, {})
        assert relative_error(found, expected) <= 1e-4
        if feature is not None and found_feature is not None:
            cached = compressed.denoiser.cached(x, step, {}, feature)
            assert relative_error(deployed.denoiser.cached(x, step, {}, found_feature), cached) <= 1e-4
        other = deployed.denoiser.full(x, (step + 3) % 6, {})[0]
        assert relative_error(other, expected) > 1e-3  # a wrong step differs by ten tolerances
    assert (images(deployed) - images(compressed)).abs().max() <= 1e-4


@pytest.fixture
def alternating(tiny_compressed: Make, tmp_path: Path) -> Callable[[str], Path]:
    """Artifacts whose input scales shrink to a fifth at odd steps, so that a wrong step shows."""

    def make(recipe: str) -> Path:
        compressed = copy.copy(tiny_compressed(recipe))
        factor = torch.tensor([1.0, 0.2, 1.0, 0.2, 1.0, 0.2])
        table = {
            name: value * factor if ".input." in name and name.endswith(".scale") else value
            for name, value in compressed.compression.table.items()
        }
        compressed.compression = dataclasses.replace(compressed.compression, table=table)
        return deploy.export(compressed, tmp_path / "alternating")

    return make


@needs_vnni
@pytest.mark.parametrize("backend", ["vnni", "onednn"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w8a8+deepcache-3"])
def test_int8_kernels_agree_within_rounding_flips(
    recipe: str, backend: str, alternating: Artifact, tiny_calibration: CalibrationSet
) -> None:
    if backend == "vnni" and native.product_obstacle():
        pytest.skip(native.product_obstacle())
    path = alternating(recipe)
    reference, int8 = (deploy.load(path, backend=name) for name in ("reference", backend))
    rows = [row for row in int8.backend_report() if row.scheme in ("w8a8", "w4a8")]
    assert rows
    assert any(row.backend == backend for row in rows)
    assert all(row.backend == "onednn" for row in rows if row.backend != backend)  # few channels
    for step in range(6):
        x = next(tiny_calibration.batches(step)).sample
        expected, _ = reference.denoiser.full(x, step, {})
        bound = INT8_BOUND * rms(expected)
        assert rms(int8.denoiser.full(x, step, {})[0] - expected) <= bound
        wrong = [int8.denoiser.full(x, other, {})[0] for other in range((step + 1) % 2, 6, 2)]
        assert min(rms(found - expected) for found in wrong) > 10 * bound


@needs_vnni
def test_fused_attention_differs_from_the_scheme_by_one_rounding(
    tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    """ "auto" leaves query, key, value and the softmax output in floating point, which the report says."""
    int8, auto = (deploy.load(tiny_artifact("w8a8"), backend=name) for name in ("onednn", "auto"))
    matmuls = [row for row in auto.backend_report() if row.kind == "attention"]
    assert {row.backend for row in matmuls} == {"fused float"}
    assert all("more precise than the scheme" in row.reason for row in matmuls)
    for step in range(6):
        x = next(tiny_calibration.batches(step)).sample
        expected, _ = int8.denoiser.full(x, step, {})
        assert 0 < rms(auto.denoiser.full(x, step, {})[0] - expected) <= 0.05 * rms(expected)


def test_it_is_called_like_its_diffusers_pipeline(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8+deepcache-3"))
    assert isinstance(deployed.pipe, DDIMPipeline)
    pictures = deployed(batch_size=2, generator=torch.Generator().manual_seed(0)).images
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    (raw,) = deployed(batch_size=1, output_type="pt", return_dict=False)
    assert raw.shape == (1, 1, 8, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert len(deployed(batch_size=2, generator=generators, num_inference_steps=6).images) == 2
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps=50, but 6 were recorded"):
        deployed(batch_size=1, num_inference_steps=50)


def test_no_float_weight_of_a_quantized_layer_is_left(
    tiny_artifact: Artifact, tiny_pipeline: DDIMPipeline
) -> None:
    parameters = sum(value.numel() for value in tiny_pipeline.unet.parameters())
    sizes = {
        recipe: deploy.verify(tiny_artifact(recipe)).denoiser_bytes
        for recipe in ("w8a8", "w4a8", "deepcache-3")
    }
    assert sizes["deepcache-3"] > 4 * parameters
    assert (
        sizes["w4a8"] < sizes["w8a8"] < 0.75 * sizes["deepcache-3"]
    )  # tiny layers: mostly headers and scales


def test_manifest_says_what_is_inside(tiny_artifact: Artifact) -> None:
    manifest = deploy.verify(tiny_artifact("w4a8+deepcache-2:branch=1"))
    assert manifest.recipe.name == "w4a8+deepcache-2:branch=1"
    assert manifest.schedule.full_steps == (0, 2, 4)
    assert manifest.sampler.num_inference_steps == 6
    assert manifest.pipeline_class == "DDIMPipeline"
    assert "layers quantized, 6 steps (3 cached)" in manifest.summary()
    assert "nothing quantized" in deploy.verify(tiny_artifact("deepcache-3")).summary()


@pytest.mark.parametrize("recipe", ["w4a8+deepcache-2:branch=1", "deepcache-3"])
def test_the_same_input_gives_the_same_bytes(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    again = deploy.export(tiny_compressed(recipe), tmp_path / "again")
    first = tiny_artifact(recipe)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    stored = deploy.export(compress.load(tiny_compressed(recipe).path), tmp_path / "stored")
    for name in ("unet/errata.safetensors", "unet/config.json", "errata.json"):
        assert (first / name).read_bytes() == (stored / name).read_bytes()
    # diffusers keeps lists in the order of a set, another in every process, under private names
    private = [key for key in json.loads((first / "unet/config.json").read_text()) if key.startswith("_")]
    assert private == ["_class_name", "_diffusers_version"]


def test_a_cache_only_artifact_keeps_half_precision(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet).to(torch.bfloat16)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    recording = calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=3, num_samples=1, batch_size=1
    )
    compressed = compress.apply(pipe, recording, "deepcache-2", tmp_path / "compressed")
    direct = deploy.verify(deploy.export(compressed, tmp_path / "direct"))
    stored = deploy.verify(deploy.export(compress.load(tmp_path / "compressed"), tmp_path / "stored"))
    assert direct.denoiser_bytes == stored.denoiser_bytes < 0.6 * direct.float32_weight_bytes
    assert deploy.load(tmp_path / "stored")(batch_size=1, output_type="pt").images.dtype is torch.bfloat16


def test_without_vnni_nothing_saturates_silently(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "is_available", lambda: False)
    rows = deploy.load(tiny_artifact("w8a8")).backend_report()
    assert {row.backend for row in rows if row.scheme == "w8a8"} == {"reference"}
    assert any("no VNNI" in row.reason for row in rows)
    with pytest.raises(ArtifactError, match="backend 'onednn' cannot run: this CPU has no VNNI"):
        deploy.load(tiny_artifact("w8a8"), backend="onednn")


@needs_vnni
@pytest.mark.parametrize("has_own_kernel", [True, False])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_each_layer_runs_the_kernel_that_the_report_names(
    recipe: str, has_own_kernel: bool, tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_own_kernel and native.product_obstacle():
        pytest.skip(native.product_obstacle())
    if not has_own_kernel:
        monkeypatch.setattr(native, "product_obstacle", lambda: "switched off")
    runtime_layers = ((Int8Layer, "product"), (ReferenceLayer, "forward"), (WeightOnlyLayer, "forward"))
    for kind, method in runtime_layers:
        monkeypatch.setattr(kind, method, told_to_the_profiler(getattr(kind, method)))
    deployed = deploy.load(tiny_artifact(recipe))
    with torch.profiler.profile() as profile:
        deployed.denoiser.full(torch.randn(1, 1, 8, 8), 0, {})
    kernels = {
        event.name.removeprefix("layer "): {child.name for child in all_children(event)}
        for event in profile.events()
        if event.name.startswith("layer ")
    }
    rows = {row.layer: row.backend for row in deployed.backend_report() if row.kind in ("conv2d", "linear")}
    assert set(rows) == set(kernels)
    for layer, backend in rows.items():
        found = {
            "vnni": "errata::int8_product" in kernels[layer],
            "onednn": any(name.startswith("onednn::q") for name in kernels[layer]),
            "float": bool(kernels[layer] & {"aten::conv2d", "aten::linear"}),
        }
        assert found == {
            name: name == (backend if backend in ("vnni", "onednn") else "float") for name in found
        }, layer
    # Only errata's own kernel is fast for a first convolution.
    kinds = {"vnni", "weight only"} if has_own_kernel else {"onednn", "reference", "weight only"}
    assert kinds == set(rows.values())


@needs_vnni
def test_compiled_blocks_are_compiled_once_for_all_steps(tiny_artifact: Artifact) -> None:
    plain, compiled = (deploy.load(tiny_artifact("w8a8")) for _ in range(2))
    network = compiled.pipe.unet.module.unet
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        block.compile(backend="eager")
    x = torch.randn(2, 1, 8, 8)
    compiled.denoiser.full(x, 0, {})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 6):
            assert torch.equal(compiled.denoiser.full(x, step, {})[0], plain.denoiser.full(x, step, {})[0])


def told_to_the_profiler(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def told(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.profiler.record_function(f"layer {layer.scheme.name}"):
            return method(layer, *args, **kwargs)

    return told


def all_children(event: Any) -> list[Any]:
    return [found for child in event.cpu_children for found in (child, *all_children(child))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "unknown backend 'tensorrt'; allowed are auto, reference, vnni"),
        ({"device": "quantum"}, "device 'quantum' cannot be used"),
        ({"on_mismatch": "guess"}, "unknown on_mismatch 'guess'; allowed are 'error' and 'nearest'"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: dict[str, Any], message: str, tiny_artifact: Artifact
) -> None:
    with pytest.raises(ArtifactError, match=message):
        deploy.load(tiny_artifact("w8a8"), **arguments)


def test_only_compressed_pipelines_are_exported(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="deploy takes a CompressedPipeline, got DDIMPipeline"):
        deploy.export(tiny_pipeline, tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_no_artifact_may_name_is_refused(tiny_compressed: Make, tmp_path: Path) -> None:
    class OwnPipeline(DDIMPipeline):
        """Code that no artifact carries."""

    class OwnScheduler(DDIMScheduler):
        """More of it."""

    pipe = tiny_compressed("w8a8").float_pipe
    for other, message in [
        (
            OwnPipeline(unet=pipe.unet, scheduler=pipe.scheduler),
            "OwnPipeline is not a pipeline of diffusers or errata",
        ),
        (
            LDMPipeline(vqvae=VQModel(), unet=pipe.unet, scheduler=OwnScheduler()),
            "OwnScheduler cannot be deploye",
        ),
    ]:
        compressed = copy.copy(tiny_compressed("w8a8"))
        compressed.float_pipe = other
        with pytest.raises(ArtifactError, match=message):
            deploy.export(compressed, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(tiny_artifact: Artifact, tiny_calibration: CalibrationSet) -> None:
    cpu = deploy.load(tiny_artifact("w8a8"), device="cpu", backend="reference")
    cuda = deploy.load(tiny_artifact("w8a8"))
    assert cuda.pipe.device.type == "cuda"
    x = next(tiny_calibration.batches(2)).sample
    found, _ = cuda.denoiser.full(x.cuda(), 2, {})
    expected, _ = cpu.denoiser.full(x, 2, {})
    assert (found.cpu() - expected).square().mean().sqrt() <= 0.02 * expected.square().mean().sqrt()
