"""Every served pipeline class: recorded, compressed to W8A8, deployed, and compared with its float self.

A random network has nothing to lose but its trajectory, so the measure is the distance to what the float
pipeline draws from the same seeds. What a wrong artifact and another seed give shows that it is a measure.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import compress, deploy

Build = Callable[[str], Any]
LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
STEPS = 4  # of `small_compressed`
# Lowest PSNR in dB of W8A8 against float: what was measured with int8 kernels and five steps, less 4 dB.
BOUNDS = {
    "ddim": 31.0,
    "ldm labels vq": 28.5,
    "ldm context kl": 42.0,
    "ldm unconditional": 29.5,
    "sd 1": 39.0,
    "sd 2": 34.0,
    "sdxl": 37.0,
    "sd upscale": 36.0,
    "sd latent upscale": 39.0,
    "audioldm2": 38.0,
}
SLOW = {"audioldm2"}
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2


def psnr(found: Tensor, expected: Tensor) -> float:
    """In dB, against the range of what is expected: images have 0 to 1, sound has any."""
    spread = expected.max() - expected.min()
    return float(10 * torch.log10(spread.square() / (found - expected).square().mean()))


def with_doubled_output(compressed: compress.CompressedPipeline) -> compress.CompressedPipeline:
    """The same pipeline with a classic mistake: the scale of the last layer's weight is twice too large."""
    wrong = copy.copy(compressed)
    table = dict(compressed.compression.table)
    table["conv_out.weight_scale"] = 2 * table["conv_out.weight_scale"]
    wrong.compression = dataclasses.replace(compressed.compression, table=table)
    return wrong


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BOUNDS]
)
def test_an_artifact_draws_what_the_float_pipeline_draws(
    name: str, small_pipeline: Build, small_compressed: Build, tmp_path: Path
) -> None:
    small, compressed = small_pipeline(name), small_compressed(name)
    deployed = deploy.load(deploy.export(compressed, tmp_path / "artifact"))
    deployed.pipe.set_progress_bar_config(disable=True)
    assert type(deployed.pipe) is type(small.pipe)
    assert set(deployed.pipe.components) == set(small.pipe.components)
    expected = small.draw(functools.partial(small.pipe, num_inference_steps=STEPS), 0)
    found = small.draw(deployed, 0)
    right = psnr(found, expected)
    other_seed = psnr(small.draw(deployed, 7), expected)
    wrong = deploy.load(deploy.export(with_doubled_output(compressed), tmp_path / "wrong"))
    wrong.pipe.set_progress_bar_config(disable=True)
    doubled = psnr(small.draw(wrong, 0), expected)
    LOG.info("%s: %.1f dB, another seed %.1f, a doubled scale %.1f", name, right, other_seed, doubled)
    assert torch.isfinite(found).all()
    assert right > BOUNDS[name]
    assert max(other_seed, doubled) < BOUNDS[name] - 6
