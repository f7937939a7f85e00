from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from errata.compress.unet import BranchedUNet, float_layer, skip_widths
from errata.errors import RecipeError


@pytest.fixture
def model(tiny_pipeline: DDIMPipeline) -> BranchedUNet:
    return BranchedUNet(tiny_pipeline.unet)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 8, 8)


@pytest.mark.parametrize("branch", [0, 1, 2, 3])
@torch.no_grad()
def test_full_equals_the_diffusers_forward(model: BranchedUNet, x: Tensor, branch: int) -> None:
    output, feature = model.full(x, 500, {}, branch=branch)
    assert torch.equal(output, model.unet(x, 500).sample)
    assert (feature is None) == (branch == 0)
    assert (output - model.unet(x, 400).sample).abs().max() > 1e-3


@pytest.mark.parametrize("branch", [1, 2, 3])
@torch.no_grad()
def test_cached_with_its_own_feature_equals_full(model: BranchedUNet, x: Tensor, branch: int) -> None:
    output, feature = model.full(x, 500, {}, branch=branch)
    assert feature is not None
    assert torch.equal(model.cached(x, 500, {}, feature, branch=branch), output)
    other = model.cached(x, 500, {}, feature * 2, branch=branch)
    assert (other - output).abs().max() > 0.01  # the feature is read
    moved = model.cached(x + 1, 500, {}, feature, branch=branch)
    assert (moved - output).abs().max() > 0.01  # and the input still matters


@torch.no_grad()
def test_a_cached_call_runs_the_shallow_branch_only(model: BranchedUNet, x: Tensor) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.unet.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    _, feature = model.full(x, 500, {}, branch=2)
    full = set(ran)
    ran.clear()
    assert feature is not None
    model.cached(x, 500, {}, feature, branch=2)
    for handle in handles:
        handle.remove()
    blocks = {name.rpartition(".conv")[0] for name in ran} - {""}
    assert blocks == {"down_blocks.0.resnets.0", "up_blocks.1.resnets.1", "up_blocks.1.resnets.2"}
    assert {"conv_in", "conv_out"} <= set(ran) < full


def test_skip_widths_are_those_of_the_concatenations(model: BranchedUNet, x: Tensor) -> None:
    seen: dict[str, int] = {}
    widths = skip_widths(model.unet)
    original = torch.cat

    def spy(tensors: list[Tensor], dim: int = 0) -> Tensor:
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            seen[str(len(seen))] = tensors[0].shape[1]
        return original(tensors, dim=dim)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "cat", spy)
        model.full(x, 500, {}, branch=0)
    first = [width for name, width in widths.items() if name.endswith(".conv1")]
    assert first == list(seen.values())
    for name, width in widths.items():
        assert 0 < width < float_layer(model.unet, name).weight.shape[1]


@torch.no_grad()
def test_class_labels_reach_the_network(make_plain_unet: Callable[..., UNet2DModel]) -> None:
    unet = make_plain_unet(num_class_embeds=3)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    model = BranchedUNet(unet)
    output, _ = model.full(x, 500, {"class_labels": labels}, branch=0)
    assert torch.equal(output, unet(x, 500, class_labels=labels).sample)
    with pytest.raises(ValueError, match="this UNet takes class_labels"):
        model.full(x, 500, {}, branch=0)


def test_labels_for_an_unconditional_network_are_refused(model: BranchedUNet, x: Tensor) -> None:
    with pytest.raises(ValueError, match="takes no class_labels"):
        model.full(x, 500, {"class_labels": torch.zeros(2)}, branch=0)


def test_other_networks_are_refused() -> None:
    conditional = UNet2DConditionModel.__new__(UNet2DConditionModel)
    with pytest.raises(RecipeError, match="UNet2DConditionModel; supported is diffusers' UNet2DModel"):
        BranchedUNet(conditional)  # type: ignore[arg-type]


def test_unsupported_blocks_are_refused() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
    )
    with pytest.raises(RecipeError, match="down_blocks.0 is a SkipDownBlock2D; supported are"):
        BranchedUNet(unet)
