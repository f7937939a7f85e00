"""Calls that run as one native program give what the same network gives layer by layer, to the bit."""

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
from errata.deploy.cpu.attention_kernel import attention_kinds
from errata.deploy.cpu.planned_unet import PlannedUNet

pytestmark = [
    pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions"),
    pytest.mark.skipif(bool(native.product_obstacle()), reason=native.product_obstacle() or "there is none"),
    pytest.mark.skipif(not attention_kinds(), reason="torch computes attention on this CPU"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers 0.42, NumPy 2
]
# What torch computes in between, where no program can be made.
PROGRAMS = ["ddim", "ldm labels vq", "ldm context kl", "ldm unconditional", "sd 1", "sd 2", "sdxl"]
OTHERS = ["sd upscale", "sd latent upscale"]


def loaded_twice(compressed: CompressedPipeline, out: Path) -> tuple[DeployedPipeline, DeployedPipeline]:
    """One that may make programs, and one that runs layer by layer because of a hook."""
    path = deploy.export(compressed, out)
    planned, layers = deploy.load(path), deploy.load(path)
    for deployed in (planned, layers):
        deployed.pipe.set_progress_bar_config(disable=True)
    layers.pipe.unet.module.unet.register_forward_hook(lambda *_: None)
    return planned, layers


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
    small = small_pipeline(name)
    planned, layers = loaded_twice(small_compressed(name), tmp_path / "artifact")
    network = planned.pipe.unet.module
    assert isinstance(network, PlannedUNet)
    for seed in (0, 5):  # other noise, so another run of the same programs
        found, wanted = images_of(planned, small, seed), images_of(layers, small, seed)
        assert torch.equal(found, wanted)
        assert not torch.equal(found, images_of(layers, small, seed + 1))
    assert layers.pipe.unet.module.plan().startswith("layer by layer: a module has a hook")
    assert network.plan().startswith("native programs of" if name in PROGRAMS else "layer by layer: ")


@pytest.mark.parametrize("name", ["ldm labels vq", "sd 1", "sdxl"])
def test_a_program_follows_what_it_is_given(
    name: str,
    small_pipeline: Callable[[str], Any],
    small_compressed: Callable[[str], CompressedPipeline],
    tmp_path: Path,
) -> None:
    small = small_pipeline(name)
    planned, layers = loaded_twice(small_compressed(name), tmp_path / "artifact")
    seen: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    plain = layers.denoiser.full

    def told(x: Tensor, step: int, cond: Mapping[str, Tensor]) -> Any:
        seen.append((x, cond))
        return plain(x, step, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.denoiser, "full", told)
        images_of(layers, small, 0)
    x, cond = seen[0]
    for step in (0, 0, 1, 2):
        planned.denoiser.full(x, step, cond)
    wanted = layers.denoiser.full(x, 1, cond)[0]
    for given in cond:
        changed = {**cond, given: other_than(cond[given])}
        found, right = (loaded.denoiser.full(x, 1, changed)[0] for loaded in (planned, layers))
        assert torch.equal(found, right), given
        assert not torch.equal(right, wanted), given
    assert planned.pipe.unet.module.plan().startswith("native programs of")


def other_than(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    return (value + 1) % 2
