"""When calls run as programs, and that nothing of an earlier call is left in a later one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata import deploy
from errata.deploy import DeployedPipeline
from errata.deploy.cpu import int8, native
from errata.deploy.cpu.attention_kernel import attention_kinds
from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.cpu.planned_unet import PlannedUNet
from errata.runtime.feature_correction import CorrectedOutput

pytestmark = [
    pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions"),
    pytest.mark.skipif(bool(native.product_obstacle()), reason=native.product_obstacle() or "there is none"),
    pytest.mark.skipif(not attention_kinds(), reason="torch computes attention on this CPU"),
]
Artifact = Callable[[str], Path]


def network_of(deployed: DeployedPipeline) -> PlannedUNet:
    network = deployed.pipe.unet.module
    assert isinstance(network, PlannedUNet)
    return network


def noise(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def layer_by_layer(deployed: DeployedPipeline, call: Callable[..., Any], *args: Any) -> Any:
    handle = network_of(deployed).unet.register_forward_hook(lambda *_: None)
    try:
        return call(*args)
    finally:
        handle.remove()


def is_planned(deployed: DeployedPipeline) -> bool:
    return network_of(deployed).plan().startswith("native programs of")


@pytest.fixture
def planned(tiny_artifact: Artifact) -> DeployedPipeline:
    """One whose full calls of two rows run as a program."""
    deployed = deploy.load(tiny_artifact("w8a8+deepcache-3"))
    for step in (0, 1):
        deployed.denoiser.full(noise(step), step, {})
    assert is_planned(deployed)
    return deployed


@pytest.mark.parametrize("recipe", ["w8a8+deepcache-3", "w8a8+deepcache-3:branch=1", "w4a8+deepcache-3"])
def test_full_and_cached_calls_of_every_step(recipe: str, tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact(recipe))
    denoiser = deployed.denoiser
    for seed, step in enumerate((0, 1, 2, 3, 4, 5, 0, 3)):
        x = noise(seed)
        prediction, feature = denoiser.full(x, step, {})
        assert feature is not None
        cached = denoiser.cached(x + 1, step, {}, feature)
        wanted, kept = layer_by_layer(deployed, denoiser.full, x, step, {})
        again = layer_by_layer(deployed, denoiser.cached, x + 1, step, {}, kept)
        assert torch.equal(prediction, wanted)
        assert torch.equal(feature, kept)
        assert torch.equal(cached, again)
    denoiser.full(noise(0), 0, {})
    assert network_of(deployed).plan().count(",") == 2  # two programs, and the memory


def test_a_caller_keeps_what_it_got(planned: DeployedPipeline) -> None:
    prediction, feature = planned.denoiser.full(noise(3), 2, {})
    assert feature is not None
    before = prediction.clone(), feature.clone()
    planned.denoiser.full(noise(4), 3, {})
    assert torch.equal(prediction, before[0])
    assert torch.equal(feature, before[1])
    prediction.zero_()
    assert torch.equal(planned.denoiser.full(noise(3), 2, {})[0], before[0])


def test_a_caller_keeps_what_every_call_gave(tiny_artifact: Artifact) -> None:
    """That of the first call, of the recorded one, and of programs."""
    deployed = deploy.load(tiny_artifact("w8a8+deepcache-3"))
    found: list[Any] = [deployed.denoiser.full(noise(seed), seed, {}) for seed in range(4)]
    for seed, kept in enumerate(found):
        wanted = layer_by_layer(deployed, deployed.denoiser.full, noise(seed), seed, {})
        assert torch.equal(kept[0], wanted[0])
        assert torch.equal(kept[1], wanted[1])


def test_a_hook_sees_every_call(planned: DeployedPipeline) -> None:
    seen: list[Any] = []
    block = network_of(planned).unet.mid_block
    handle = block.register_forward_hook(lambda *arguments: seen.append(arguments))
    planned.denoiser.full(noise(5), 2, {})
    assert len(seen) == 1
    assert network_of(planned).plan() == "layer by layer: a module has a hook"
    handle.remove()
    planned.denoiser.full(noise(5), 2, {})
    assert len(seen) == 1
    assert is_planned(planned)


def test_a_global_hook_sees_every_call(planned: DeployedPipeline) -> None:
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: seen.append(arguments))
    try:
        planned.denoiser.full(noise(5), 2, {})
    finally:
        handle.remove()
    assert len(seen) > 10


def test_a_replaced_layer_is_the_one_that_runs(planned: DeployedPipeline) -> None:
    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)
            return 2 * output

    x, unet = noise(6), network_of(planned).unet
    before = planned.denoiser.full(x, 2, {})[0]
    unet.conv_in = Doubled(unet.conv_in)
    changed = [planned.denoiser.full(x, 2, {})[0] for _ in range(3)]
    assert all(torch.equal(changed[0], other) for other in changed)
    assert not torch.allclose(changed[0], before, atol=0.1 * float(before.abs().max()))
    assert network_of(planned).plan().startswith("layer by layer: ")
    unet.conv_in = unet.conv_in.layer
    assert all(torch.equal(planned.denoiser.full(x, 2, {})[0], before) for _ in range(3))
    assert is_planned(planned)


@pytest.mark.parametrize("how", ["another", "its data", "in place"])
def test_a_replaced_parameter_is_the_one_that_counts(how: str, planned: DeployedPipeline) -> None:
    x, norm = noise(6), network_of(planned).unet.mid_block.resnets[0].norm1
    before = planned.denoiser.full(x, 2, {})[0]
    if how == "another":
        norm.weight = nn.Parameter(3 * norm.weight, requires_grad=False)
    elif how == "its data":
        norm.weight.data = 3 * norm.weight.data
    else:
        norm.weight.mul_(3)
    found = [planned.denoiser.full(x, 2, {})[0] for _ in range(3)]
    assert is_planned(planned)
    wanted = layer_by_layer(planned, planned.denoiser.full, x, 2, {})[0]
    assert all(torch.equal(other, wanted) for other in found)
    assert not torch.equal(wanted, before)


def test_each_shape_has_its_own(planned: DeployedPipeline) -> None:
    for rows in (1, 3, 2):
        x = noise(rows, rows)
        wanted, _ = layer_by_layer(planned, planned.denoiser.full, x, 4, {})
        for _ in range(3):
            assert torch.equal(planned.denoiser.full(x, 4, {})[0], wanted)
        transposed = x.to(memory_format=torch.channels_last)
        assert torch.equal(planned.denoiser.full(transposed, 4, {})[0], wanted)


def test_a_clone_makes_its_own(planned: DeployedPipeline) -> None:
    clone = planned.clone()
    assert not is_planned(clone)
    x = noise(7)
    wanted = planned.denoiser.full(x, 3, {})[0]
    assert all(torch.equal(clone.denoiser.full(x, 3, {})[0], wanted) for _ in range(3))
    assert is_planned(clone)


def test_inside_and_outside_inference_mode(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"))
    x = noise(8)
    with torch.inference_mode():
        found = [deployed.denoiser.full(x, step, {})[0] for step in (0, 1, 1)]
    outside = deployed.denoiser.full(x.clone(), 1, {})[0]
    assert torch.equal(found[1], outside)
    assert torch.equal(found[2], outside)
    assert is_planned(deployed)


def test_under_a_profiler_the_layers_show(planned: DeployedPipeline) -> None:
    with torch.profiler.profile() as profile:
        planned.denoiser.full(noise(9), 2, {})
    events = {event.key: event.count for event in profile.key_averages()}
    assert events["errata::int8_product"] > 10


def test_at_other_steps_ranges_and_times_differ(planned: DeployedPipeline) -> None:
    with pytest.warns(UserWarning, match="4 steps; 6 were recorded"):
        other = planned.at_steps(4)
    for step in (0, 1, 2, 3):
        x = noise(step + 20)
        wanted = layer_by_layer(planned, other.denoiser.full, x, step, {})[0]
        assert torch.equal(other.denoiser.full(x, step, {})[0], wanted)
    assert is_planned(planned)


def test_what_torch_computes_in_between_ends_a_recording(planned: DeployedPipeline) -> None:
    unet = network_of(planned).unet
    layer = next(module for module in unet.modules() if isinstance(module, Int8Layer))
    plain = type(layer).product

    def negated(self: Int8Layer, *args: Any, **kwargs: Any) -> Tensor:
        return -plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Layer, "product", negated)
        for seed in range(3):  # of one row: there is no program yet
            planned.denoiser.full(noise(seed, 1), 0, {})
    assert "other calls layer by layer: " in network_of(planned).plan()


def test_corrected_cached_calls_of_every_step(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8+cachequant-3"))
    denoiser = deployed.denoiser
    feature = denoiser.full(noise(1), 0, {})[1]
    assert feature is not None
    for step in (1, 2, 3, 4, 5, 1):
        x = noise(step)
        found = denoiser.cached(x, step, {}, feature)
        assert torch.equal(found, layer_by_layer(deployed, denoiser.cached, x, step, {}, feature))
    denoiser.cached(noise(0), 1, {}, feature)
    assert is_planned(deployed)
    assert "layer by layer" not in network_of(deployed).plan()


def test_another_network_is_the_one_that_runs(tiny_artifact: Artifact) -> None:
    first, second = (deploy.load(tiny_artifact(recipe)) for recipe in ("w8a8", "w4a8"))
    x = noise(11)
    before, wanted = ([loaded.denoiser.full(x, 2, {})[0] for _ in range(3)][2] for loaded in (first, second))
    assert not torch.equal(before, wanted)
    own, network_of(first).unet = network_of(first).unet, network_of(second).unet
    with pytest.raises(RuntimeError, match="no sampling step is set"):  # whose layers read another context
        first.denoiser.full(x, 2, {})
    network_of(first).unet = own
    assert all(torch.equal(first.denoiser.full(x, 2, {})[0], before) for _ in range(3))
    assert is_planned(first)


def test_compiled_blocks_run_compiled(planned: DeployedPipeline) -> None:
    block, calls = network_of(planned).unet.mid_block, []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(inputs)
        return graph.forward

    x = noise(12)
    wanted = planned.denoiser.full(x, 2, {})[0]
    block.compile(backend=backend)
    found = planned.denoiser.full(x, 2, {})[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert network_of(planned).plan() == "layer by layer: a module was compiled"


def test_a_replaced_buffer_is_the_one_that_counts(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8+cachequant-3"))
    denoiser, x = deployed.denoiser, noise(13)
    feature = denoiser.full(noise(1), 0, {})[1]
    assert feature is not None
    before = [denoiser.cached(x, 1, {}, feature) for _ in range(3)][2]
    corrected = next(
        module for module in network_of(deployed).unet.modules() if isinstance(module, CorrectedOutput)
    )
    corrected.gain = 2 * corrected.gain
    found = [denoiser.cached(x, 1, {}, feature) for _ in range(3)]
    wanted = layer_by_layer(deployed, denoiser.cached, x, 1, {}, feature)
    assert all(torch.equal(other, wanted) for other in found)
    assert not torch.equal(wanted, before)
