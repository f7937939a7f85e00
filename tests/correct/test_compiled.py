"""An artifact whose network went through `torch.compile` is corrected as before."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import deploy
from errata.correct import IEC, Forecast, Hindsight, Lookahead, Plan, wrap
from errata.deploy import DeployedPipeline

PLAN = Plan(IEC()) + Plan(Lookahead()) + Plan(Forecast(order=1), "last:1") + Plan(Hindsight())


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def load(path: Path) -> DeployedPipeline:
    deployed = deploy.load(path, device="cpu", backend="reference")
    deployed.pipe.set_progress_bar_config(disable=True)
    return deployed


def images(deployed: DeployedPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = wrap(deployed, PLAN)(batch_size=2, generator=generator, output_type="np").images
    return torch.as_tensor(drawn)


def in_place(module: Any, **options: Any) -> Any:
    module.compile(**options)
    return module


def compile_whole(deployed: DeployedPipeline, compiled: Callable[..., Any], **options: Any) -> None:
    branched = deployed.pipe.unet.module
    branched.unet = compiled(branched.unet, **options)


def compile_blocks(deployed: DeployedPipeline, compiled: Callable[..., Any], **options: Any) -> None:
    unet = deployed.pipe.unet.module.unet
    unet.mid_block = compiled(unet.mid_block, **options)
    for index, block in enumerate(unet.up_blocks):
        unet.up_blocks[index] = compiled(block, **options)


@pytest.mark.parametrize("compiled", [torch.compile, in_place], ids=["wrapped", "in place"])
@pytest.mark.parametrize("chosen", [compile_whole, compile_blocks], ids=["whole", "blocks"])
def test_a_compiled_network_draws_the_same_images(
    chosen: Callable[..., None], compiled: Callable[..., Any], tiny_artifact: Callable[[str], Path]
) -> None:
    """Full calls run what was compiled. A cached one has parts of it; it must not run the whole instead."""
    deployed = load(tiny_artifact("deepcache-3"))
    expected = images(deployed)
    chosen(deployed, compiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(images(deployed), expected, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_quantizers_are_compiled_whole(tiny_artifact: Callable[[str], Path]) -> None:
    """`fullgraph=True` refuses what cannot be: they look up the step's scale without leaving the graph."""
    deployed = load(tiny_artifact("w8a8+deepcache-3"))
    expected = images(deployed)
    unet = deployed.pipe.unet.module.unet
    unet.mid_block.resnets[0].compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(images(deployed), expected, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_network_that_ignores_the_cache_is_told_of(tiny_artifact: Callable[[str], Path]) -> None:
    """Compiled in a call that keeps no feature, it would keep none in the others either."""
    deployed = load(tiny_artifact("deepcache-3"))
    branched = deployed.pipe.unet.module
    branched.unet.up_blocks[1].compile(backend="eager")
    with torch.no_grad():
        branched.full(torch.zeros(2, 1, 8, 8), deployed.denoiser.timesteps[0], {}, branch=0)
    with pytest.raises(RuntimeError, match="kept no feature: torch.compile .*skip_nnmodule_hook_guards"):
        images(deployed)
