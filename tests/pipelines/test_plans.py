"""Calls that run as one native program give what the same network gives layer by layer, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import deploy
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.deploy.cpu import int8, native
from errata.deploy.cpu.planned_unet import PlannedUNet

pytestmark = [
    pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions"),
    pytest.mark.skipif(bool(native.product_obstacle()), reason=native.product_obstacle() or "there is none"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers 0.42, NumPy 2
]
# What torch computes in between, where no program can be made.
PROGRAMS = {"ddim": True, "ldm context kl": True, "ldm unconditional": True, "sd 1": True, "sd 2": True}
OTHERS = dict.fromkeys(["ldm labels vq", "sdxl", "sd upscale", "sd latent upscale"], False)


def images_of(deployed: DeployedPipeline, small: Any, seed: int) -> Tensor:
    arguments = {"generator": [torch.Generator().manual_seed(seed + row) for row in (0, 1)], **small.inputs}
    drawn: Tensor = deployed(**{**arguments, "output_type": "pt"}).images
    return drawn if isinstance(drawn, Tensor) else torch.as_tensor(drawn)


@pytest.mark.parametrize("name", [*PROGRAMS, *OTHERS])
def test_a_program_is_the_network(
    name: str,
    small_pipeline: Callable[[str], Any],
    small_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    small, path = small_pipeline(name), deploy.export(small_compressed(name), tmp_path / "artifact")
    planned, layers = deploy.load(path), deploy.load(path)
    for deployed in (planned, layers):
        deployed.pipe.set_progress_bar_config(disable=True)
    network = planned.pipe.unet.module
    assert isinstance(network, PlannedUNet)
    layers.pipe.unet.module.unet.register_forward_hook(lambda *_: None)
    for seed in (0, 5):  # other noise, so another run of the same programs
        found, wanted = images_of(planned, small, seed), images_of(layers, small, seed)
        assert torch.equal(found, wanted)
        assert not torch.equal(found, images_of(layers, small, seed + 1))
    assert layers.pipe.unet.module.plan().startswith("layer by layer: a module has a hook")
    assert network.plan().startswith("native programs of" if PROGRAMS.get(name) else "layer by layer: ")
