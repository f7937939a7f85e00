"""Every backend computes what the reference backend computes: for every served class, at every step.

The input scales of odd steps are a fifth of what was measured, so that a step's scales are known from its
neighbours'; inputs are those of a run of the artifact. Where the extra `export` is installed, the engine is
one more.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import deploy
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.deploy.cpu import int8, native
from errata.deploy.engines.agreement import distance
from errata.runtime.denoiser import Denoiser

LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
BOUND = 0.05
SHRINK = 0.2
# Exporting takes long. To a graph, the others are one of these with fewer conditions.
WITH_ENGINE = {"ddim", "ldm context kl", "sdxl", "sd upscale", "sd latent upscale", "audioldm2"}
CLASSES = [
    "ddim", "ldm labels vq", "ldm context kl", "ldm unconditional", "sd 1", "sd 2", "sdxl", "sd upscale",
    "sd latent upscale", pytest.param("audioldm2", marks=pytest.mark.slow),
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2
Call = tuple[Tensor, int, Mapping[str, Tensor]]


class Recorder:
    """A denoiser that keeps the arguments of its calls."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        self.calls.append((x, step, cond))
        return self._denoiser.full(x, step, cond)


def alternating(compressed: CompressedPipeline, out: Path) -> Path:
    """Its artifact, with the input scales of odd steps shrunk."""
    changed = copy.copy(compressed)
    steps = compressed.schedule.num_steps
    factor = torch.ones(steps)
    factor[1::2] = SHRINK
    table = {
        name: value * factor if ".input." in name and name.endswith(".scale") else value
        for name, value in compressed.compression.table.items()
    }
    changed.compression = dataclasses.replace(compressed.compression, table=table)
    return deploy.export(changed, out)


def recorded_calls(reference: DeployedPipeline, small: Any) -> list[Call]:
    """Those of a run that draws two samples."""
    recorder = Recorder(reference.denoiser)
    run = reference.start(denoiser=recorder)
    arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)], **small.inputs}
    run.pipe(**reference.arguments(arguments))
    return recorder.calls


@pytest.mark.parametrize("name", CLASSES)
def test_every_backend_agrees_with_the_reference_at_every_step(
    name: str,
    small_pipeline: Callable[[str], Any],
    small_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    small = small_pipeline(name)
    path = alternating(small_compressed(name), tmp_path / "alternating")
    reference = deploy.load(path, backend="reference")
    reference.pipe.set_progress_bar_config(disable=True)
    calls = recorded_calls(reference, small)
    steps = reference.schedule.num_steps
    assert sorted({step for _, step, _ in calls}) == list(range(steps))
    names = ["onednn"] if int8.has_onednn() else []
    names += [] if native.product_obstacle() else ["vnni"]
    others: dict[str, Denoiser] = {name: deploy.load(path, backend=name).denoiser for name in names}
    if name in WITH_ENGINE:
        others |= engine_of(path, small, tmp_path / "engine")
    for x, step, cond in calls:
        expected, _ = reference.denoiser.full(x, step, cond)
        for backend, denoiser in others.items():
            right = distance(denoiser.full(x, step, cond)[0], expected)
            wrong = distance(denoiser.full(x, step ^ 1 if step ^ 1 < steps else step - 1, cond)[0], expected)
            LOG.info("%s, %s, step %d: %.1e, another step's scales %.2f", name, backend, step, right, wrong)
            assert right <= BOUND
            assert wrong > 10 * BOUND


def engine_of(path: Path, small: Any, out: Path) -> dict[str, Denoiser]:
    """An ONNX engine, where it can be made here."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return {}
    from errata.deploy import engines

    return {"onnxruntime": deploy.load(engines.export_onnx(path, out, example=small.inputs)).denoiser}
