"""What every test shares: one thread, a fixed seed, a pipeline small enough for milliseconds."""

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch reads it, and for the programs that tests start. Small tensors gain nothing from more threads,
# several workers lose much, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from errata import quiet

with quiet.without_notices():
    import torch
    from diffusers import DDIMPipeline, UNet2DModel
    from torch import Tensor

from forked import forked as forked
from networks import network as network
from tiny import compressed_by_name, exported_by_name, tiny_ddim
from weight_search import quick_weight_search

from errata import calibration
from errata.calibration import CalibrationSet, first_calls
from errata.compress import CompressedPipeline
from errata.compress.jobs import estimation
from errata.compress.quantize import simulation, step_sketch
from errata.embedded import PIPELINE
from errata.fingerprint import value_digest

torch.set_num_threads(1)


# Files and folders whose tests take many seconds together: `make quick` leaves them out.
SLOW = (
    "benchmarks/test_paper_run.py",
    "compress/cache",
    "compress/jobs",
    "compress/quantize/test_bias_correction.py",
    "compress/quantize/test_equalization.py",
    "compress/quantize/test_sensitivity.py",
    "compress/rounding",
    "compress/test_",
    "core/quality/test_agreement.py",
    "core/test_cli_",
    "core/test_memory.py",
    "core/test_optional_packages.py",
    "core/test_pages.py",
    "core/test_reference.py",
    "correct/analysis",
    "correct/planner/test_auto.py",
    "correct/planner/test_planning.py",
    "correct/sheets/test_fitting.py",
    "correct/test_compiled.py",
    "correct/test_equation",
    "correct/test_plain_iec.py",
    "correct/test_usage.py",
    "deploy/cpu/test_arm.py",
    "deploy/cpu/test_fusion.py",
    "deploy/cuda",
    "deploy/engines",
    "deploy/test_cache",
    "deploy/test_hostile_artifacts.py",
    "deploy/test_signing.py",
    "deploy/test_weight_formats.py",
    "examples",
    "pipelines",
    "report",
    "runtime/test_branches.py",
)


def pytest_collection_finish() -> None:
    """Leave the half a million objects of what was imported out of garbage collection: they stay anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 10)
    atexit.register(gc.unfreeze)  # compiled extensions report what they still hold at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _equal_weights_are_quantized_once() -> Iterator[None]:
    """Hundreds of tests compress the same few networks, and searching the weights' scales takes time.

    What is searched for is a function of the weight and the bits alone, so a copy of the first answer serves.
    As brevitas' layer does when it is made, each search draws random numbers.
    """
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def remembered(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        key = value_digest({"weight": weight, "bits": bits}, name="weight")
        torch.empty(weight.shape).uniform_()
        if key not in known:
            known[key] = quick_weight_search(weight, bits=bits)
        codes, scale = known[key]
        return codes.clone(), scale.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "quantize_weight", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ranges_are_chosen_from_few_values() -> Iterator[None]:
    """Choosing activation ranges takes half the time of compressing a small network.

    Programs that tests start choose from as many values as a user's do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_sketch, "VALUES_PER_STEP", 2048)
        yield


@pytest.fixture(scope="session", autouse=True)
def _estimates_take_two_calls() -> Iterator[None]:
    """What work will take is said from two calls of the network, not from half a second of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimation, "_SHORT", 0.0)
        patch.setattr(first_calls, "_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def tiny_pipeline() -> DDIMPipeline:
    """An 8x8, one-channel DDIM pipeline with random weights that predicts noise of about unit size."""
    return tiny_ddim(layers_per_block=2)


@pytest.fixture(scope="session")
def make_plain_unet() -> Callable[..., UNet2DModel]:
    """`make_plain_unet(dropout=0.5)`: an 8x8, one-channel network without attention, changed as asked."""

    def make(**changes: Any) -> UNet2DModel:
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **changes,
        ).eval()

    return make


@pytest.fixture(scope="session")
def tiny_calibration(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """Six-step trajectories of `tiny_pipeline`, eight samples."""
    out = tmp_path_factory.mktemp("calibration") / "set"
    return calibration.collect(tiny_pipeline, out, num_inference_steps=6, num_samples=8, batch_size=4)


@pytest.fixture(scope="session")
def tiny_compressed(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CompressedPipeline]:
    """`tiny_compressed("w8a8+deepcache-3")`: the pipeline compressed by that recipe, once a session."""
    return compressed_by_name(tiny_pipeline, tiny_calibration, tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="session")
def tiny_artifact(
    tiny_compressed: Callable[[str], CompressedPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`tiny_artifact("w4a8")`: path of the exported artifact, once a session; never write into it."""
    return exported_by_name(tiny_compressed, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def digits() -> DDIMPipeline:
    """A trained network: of a random one, many pixels are clipped, and a PSNR says nothing."""
    pipe = DDIMPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe
