"""Caches, learned rounding and half precision on a guided text-to-image pipeline, from recording to images.

Ranges are chosen from few values: that quantization is accurate is shown in test_end_to_end.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from errata import compress, correct, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.errors import CalibrationError

Build = Callable[[str], Any]
Half = Callable[[str, torch.dtype], tuple[Any, DeployedPipeline]]
LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
STEPS, CALLS = 5, 6  # PLMS calls the network once more
# Lowest PSNR in dB against the float pipeline; 28.9 to 41.3 were measured, and 12 to 13 for another seed.
BOUND = 26.0
OTHER = 16.0
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2


@pytest.fixture(scope="module", autouse=True)
def _few_values() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.compress.quantize.step_sketch.VALUES_PER_STEP", 2048)
        yield


def changed(small: Any, scheduler: Any) -> Any:
    """The same with another scheduler."""
    pipe = type(small.pipe)(
        **{**small.pipe.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return type(small)(pipe, small.inputs)


def psnr(found: Tensor, expected: Tensor) -> float:
    """In dB, of images in 0 to 1."""
    return float(-10 * torch.log10((found - expected).square().mean()))


def deployed_from_disk(compressed: CompressedPipeline, out: Path) -> DeployedPipeline:
    """What another process would get: opened again, exported and loaded."""
    deployed = deploy.load(deploy.export(compress.load(compressed.path), out))
    deployed.pipe.set_progress_bar_config(disable=True)
    return deployed


def check_images(small: Any, deployed: DeployedPipeline, title: str) -> None:
    expected = small.draw(functools.partial(small.pipe, num_inference_steps=STEPS), 0)
    right, other = (psnr(small.draw(deployed, seed), expected) for seed in (0, 7))
    LOG.info("%s: %.1f dB, another seed %.1f", title, right, other)
    assert right > BOUND
    assert other < OTHER


@pytest.fixture(scope="module")
def guided(
    small_pipeline: Build, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, CalibrationSet, CompressedPipeline]:
    """Stable Diffusion 1 with PLMS: the pipeline, its trajectories, and its W8A8."""
    small, root = small_pipeline("sd 1"), tmp_path_factory.mktemp("guided")
    recorded = small.collect(root / "set", steps=STEPS)
    return small, recorded, compress.apply(small.pipe, recorded, "w8a8", root / "w8a8")


@pytest.mark.parametrize(
    "recipe",
    ["w8a8+cachequant-2", "w8a8+cachequant-2:corrected_by=iec,branch=2"]
    + [f"w8a8+deepcache-2:branch={branch}" for branch in (1, 2, 3, 4)],
)
def test_a_cache_on_a_guided_pipeline(
    recipe: str, guided: tuple[Any, CalibrationSet, CompressedPipeline], tmp_path: Path
) -> None:
    small, recorded, w8a8 = guided
    assert (recorded.num_steps, recorded.rows_per_sample) == (CALLS, 2)
    compressed = compress.apply(small.pipe, recorded, recipe, tmp_path / "compressed", reuse=w8a8)
    deployed = deployed_from_disk(compressed, tmp_path / "artifact")
    assert len(deployed.schedule.full_steps) == CALLS // 2
    check_images(small, deployed, recipe)


def test_a_cache_under_a_scheduler_that_scales(small_pipeline: Build, tmp_path: Path) -> None:
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    small = changed(small_pipeline("sd 1"), scheduler)
    recorded = small.collect(tmp_path / "set", steps=STEPS)
    recipe = "w8a8+cachequant-2:corrected_by=iec"
    compressed = compress.apply(small.pipe, recorded, recipe, tmp_path / "compressed")
    deployed = deployed_from_disk(compressed, tmp_path / "artifact")
    check_images(small, deployed, recipe)
    corrected = correct.wrap(deployed, correct.Plan(correct.IEC.paper(), "full"))
    assert not torch.equal(small.draw(corrected, 0), small.draw(deployed, 0))
    assert corrected.stats.extra == {"full": float(len(deployed.schedule.full_steps))}
    # Of text-to-image pipelines the paper corrects the first step alone.
    assert correct.wrap(deployed, correct.Plan.paper(deployed)).steps == (0,)


def test_learned_rounding_on_a_guided_pipeline(
    guided: tuple[Any, CalibrationSet, CompressedPipeline], tmp_path: Path
) -> None:
    small, recorded, _ = guided
    recipe = "w4a8-learned+cachequant-2:iterations=3,samples=8,batch_size=4"
    compressed = compress.apply(small.pipe, recorded, recipe, tmp_path / "compressed")
    check_images(small, deployed_from_disk(compressed, tmp_path / "artifact"), recipe)


@pytest.fixture(scope="module")
def half(small_pipeline: Build, tmp_path_factory: pytest.TempPathFactory) -> Half:
    """`half("sd 1", torch.float16)`: the pipeline converted, and its W8A8 with a cache; once."""

    @functools.cache
    def make(name: str, dtype: torch.dtype) -> tuple[Any, DeployedPipeline]:
        whole, root = small_pipeline(name), tmp_path_factory.mktemp("half")
        small = type(whole)(copy.deepcopy(whole.pipe).to(dtype), whole.inputs)
        recorded = small.collect(root / "set", steps=STEPS)
        compressed = compress.apply(small.pipe, recorded, "w8a8+cachequant-2", root / "compressed")
        return small, deployed_from_disk(compressed, root / "artifact")

    return make


@pytest.mark.parametrize(("name", "dtype"), [("sd 1", torch.float16), ("ldm labels vq", torch.bfloat16)])
def test_a_guided_pipeline_in_half_precision(name: str, dtype: torch.dtype, half: Half) -> None:
    """The network computes in float32, the decoder and the text encoder in what they had."""
    small, deployed = half(name, dtype)
    parts = {
        key: part.dtype for key, part in deployed.pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    assert parts.pop("unet") == torch.float32
    assert set(parts.values()) == {small.pipe.unet.dtype} == {dtype}
    check_images(small, deployed, f"{name}, {dtype}")


@pytest.mark.parametrize(
    "method", [correct.IEC(iterations=2, tolerance=0.0, guard=False), correct.Forecast(order=1)]
)
def test_correction_in_half_precision(method: Any, half: Half) -> None:
    """A float32 network in a half-precision pipeline: its latents have the type of the text encoder.

    What is corrected is about as far from the same network in a pipeline of single precision as a plain run
    is: 8-bit ranges turn a difference in rounding into one of whole steps.
    """
    small, deployed = half("sd 1", torch.float16)
    pipe = copy.copy(deployed.pipe)
    for name in ("vae", "text_encoder"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).float())
    whole = DeployedPipeline.of(pipe)
    assert whole is not None
    plan = correct.Plan(method)
    corrected, reference = correct.wrap(deployed, plan), correct.wrap(whole, plan)
    found, expected, plain, plain_expected = (
        run(generator=torch.Generator().manual_seed(0), output_type="latent", **small.inputs).images.float()
        for run in (corrected, reference, deployed, whole)
    )
    error, of_plain = (
        float((a - b).square().mean()) for a, b in ((found, expected), (plain, plain_expected))
    )
    moved = float((plain_expected - expected).square().mean())
    LOG.info("%s: %.1e, plain %.1e, correction %.1e", method, error, of_plain, moved)
    assert error < 4 * of_plain
    assert error < 0.5 * moved
    assert corrected.stats.extra == reference.stats.extra


def test_a_pipeline_that_takes_images_is_judged_with_those_of_its_recording(
    small_pipeline: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The calibration set does not keep them."""
    small = small_pipeline("sd inpaint")
    recorded = small.collect(tmp_path / "set", steps=STEPS, batches=2)
    assert recorded.arguments() is None
    left_out = ("batch_size", "guidance_scale")
    inputs = [{name: value for name, value in small.inputs.items() if name not in left_out}] * 2
    told = compress.compress(small.pipe, recorded, "w8a8", tmp_path / "with", inputs=inputs).compression
    assert told.calibrated_output is not None
    assert told.calibrated_output.images == 4
    assert "no images to judge by" not in caplog.text
    unjudged = compress.compress(small.pipe, recorded, "w8a8", tmp_path / "without").compression
    assert unjudged.calibrated_output is None
    assert "no images to judge by" in caplog.text
    with pytest.raises(CalibrationError, match="`inputs` are not those"):
        compress.compress(small.pipe, recorded, "w8a8", tmp_path / "other", inputs=[{}, {}])
