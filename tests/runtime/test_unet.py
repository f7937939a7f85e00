import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor, nn

from errata.errors import RecipeError
from errata.runtime.layers import float_layer
from errata.runtime.structure import (
    check_cacheable,
    check_no_lora,
    default_branch,
    embedding_layers,
    feature_channels,
    feature_readers,
    skip_widths,
)
from errata.runtime.unet import BranchedUNet

CACHEABLE = ("pixel", "labels", "resnet", "sd", "nomid", "sdxl", "upscaler", "audioldm2")
ALL = (*CACHEABLE, "k")
Network = Callable[[str], Any]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_full_equals_the_diffusers_forward(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(case.unet)
    expected = case.own_forward()
    for branch in range(model.max_branch + 1):
        output, feature = model.full(case.x, case.time, case.cond, branch=branch)
        assert torch.equal(output, expected)
        assert (feature is None) == (branch == 0)
        if feature is not None:
            assert feature.shape[:2] == (2, feature_channels(case.unet, branch))
            assert feature.untyped_storage().nbytes() == feature.nbytes  # keeps no concatenation alive
    assert (expected - case.own_forward(time=case.time + 50)).abs().max() > 1e-3
    for name in case.cond:
        if name != "added_cond_kwargs.time_ids":  # too faint in a random network of this size
            other = case.own_forward(cond={**case.cond, name: case.cond[name].flip(0)})
            assert (expected - other).abs().max() > 1e-5, name


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rows_may_be_at_different_times(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(case.unet)
    times = torch.tensor([case.time, case.time + 50])
    together, _ = model.full(case.x, times, case.cond, branch=0)
    for row, time in enumerate(times.tolist()):
        alone, _ = model.full(case.x, time, case.cond, branch=0)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", [0.0, 3.0, 0.1, float(torch.tensor(0.1))])
@torch.no_grad()
def test_a_timestep_keeps_its_fraction(network: Network, time: float) -> None:
    case = network("pixel")
    output, _ = BranchedUNet(case.unet).full(case.x, time, {}, branch=0)
    assert torch.equal(output, case.own_forward(time=torch.tensor(time, dtype=torch.float64)))


@torch.no_grad()
def test_an_argument_that_was_none_is_passed_as_none() -> None:
    """AudioLDM passes `encoder_hidden_states=None`, which a recording leaves out."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=6,
        class_embeddings_concat=True,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    x, labels = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    model = BranchedUNet(unet)
    output, feature = model.full(x, 7, {"class_labels": labels}, branch=2)
    assert torch.equal(output, unet(x, 7, encoder_hidden_states=None, class_labels=labels).sample)
    assert feature is not None
    assert torch.equal(model.cached(x, 7, {"class_labels": labels}, feature, branch=2), output)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_skip_widths_are_those_of_the_concatenations(network: Network, name: str) -> None:
    case = network(name)
    joined: dict[int, int] = {}  # storage of a concatenation → width of its main half
    seen: dict[str, int] = {}
    original = torch.cat

    def spy(tensors: Any, dim: int = 0) -> Tensor:
        output = original(tensors, dim=dim)
        if dim == 1 and len(tensors) == 2 and output.ndim == 4:
            joined[id(output)] = tensors[0].shape[1]
            kept.append(output)
        return output

    kept: list[Tensor] = []
    handles = []
    for resnet_name, module in case.unet.named_modules():
        if hasattr(module, "conv_shortcut") and resnet_name.startswith("up_blocks"):

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = resnet_name) -> None:
                if id(args[0]) in joined:
                    seen[name] = joined[id(args[0])]

            handles.append(module.register_forward_pre_hook(hook))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", spy)
        case.own_forward()
    for handle in handles:
        handle.remove()
    widths = skip_widths(case.unet)
    assert {name.rpartition(".")[0]: width for name, width in widths.items()} == seen
    assert all(0 < width < float_layer(case.unet, name).weight.shape[1] for name, width in widths.items())
    assert {name.rpartition(".")[2] for name in widths} == {"conv1", "conv_shortcut"}


def test_feature_readers_are_named(network: Network) -> None:
    unet = network("pixel").unet
    first = "up_blocks.2.resnets.2"
    assert feature_readers(unet, 1) == (f"{first}.conv1", f"{first}.conv_shortcut")
    assert feature_readers(unet, 9)[0] == "up_blocks.0.resnets.0.conv1"
    assert set(feature_readers(unet, 4)) < skip_widths(unet).keys()


def test_default_branches_are_those_of_the_papers(network: Network, make_plain_unet: Any) -> None:
    assert default_branch(network("pixel").unet) == 3
    assert default_branch(make_plain_unet(layers_per_block=0)) == 2
    assert {default_branch(network(name).unet) for name in ("sd", "sdxl", "audioldm2")} == {1}
    with pytest.raises(RecipeError, match="down_blocks.0 is a KDownBlock2D"):
        default_branch(network("k").unet)


def test_branches_out_of_range_are_refused(network: Network) -> None:
    case = network("pixel")
    model = BranchedUNet(case.unet)
    for branch in (-1, 10):
        with pytest.raises(RecipeError, match=f"branch={branch}, but .* 9 resnets; allowed are 1 to 9"):
            model.full(case.x, 1, {}, branch=branch)
    with pytest.raises(RecipeError, match="branch=10"):
        feature_channels(case.unet, 10)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_embedding_layers_read_embeddings(network: Network, name: str) -> None:
    """What they read is a vector a sample, and no other layer that reads one is missing."""
    case = network(name)
    shapes: dict[str, int] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: shapes.__setitem__(name, args[0].ndim))
        for name, module in case.unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    case.own_forward()
    for handle in handles:
        handle.remove()
    assert embedding_layers(case.unet) == {name for name, ndim in shapes.items() if ndim == 2}


def test_adaptive_norms_and_added_embeddings_are_among_them(network: Network) -> None:
    k = network("k").unet
    linears = {f"{name}.linear" for name, module in k.named_modules() if isinstance(module, AdaGroupNorm)}
    assert len(linears) > 10
    assert linears | {"time_embedding.cond_proj"} <= embedding_layers(k)
    assert "add_embedding.linear_2" in embedding_layers(network("sdxl").unet)
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        encoder_hid_dim=6,
        cross_attention_dim=8,
    )
    assert "encoder_hid_proj" in embedding_layers(unet)


@torch.no_grad()
def test_class_labels_are_demanded_by_the_network(network: Network, tiny_pipeline: DDIMPipeline) -> None:
    case = network("labels")
    with pytest.raises(ValueError, match="class_labels should be provided"):
        BranchedUNet(case.unet).full(case.x, 500, {}, branch=0)
    with pytest.raises(ValueError, match="class_embedding needs to be initialized"):
        BranchedUNet(tiny_pipeline.unet).full(case.x, 500, case.cond, branch=0)


def test_other_networks_are_refused() -> None:
    with pytest.raises(RecipeError, match="the denoiser is a Linear; supported are UNet2DModel, UNet2DCond"):
        BranchedUNet(nn.Linear(1, 1))


@torch.no_grad()
def test_unknown_blocks_are_evaluated_but_not_cached() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    model = BranchedUNet(unet)
    assert torch.equal(model.full(x, 3, {}, branch=0)[0], unet(x, 3).sample)
    assert model.max_branch == 0
    for refused in (lambda: model.full(x, 3, {}, branch=1), lambda: check_cacheable(unet)):
        with pytest.raises(RecipeError, match="down_blocks.0 is a SkipDownBlock2D, supported are AttnDown"):
            refused()


@torch.no_grad()
def test_k_blocks_are_evaluated_but_not_cached(network: Network) -> None:
    case = network("k")
    model = BranchedUNet(case.unet)
    assert model.max_branch == 0
    with pytest.raises(RecipeError, match="down_blocks.0 is a KDownBlock2D"):
        model.full(case.x, case.time, case.cond, branch=1)
    with pytest.raises(RecipeError, match="choose a recipe without a cache"):
        model.cached(case.x, case.time, case.cond, torch.zeros(2, 32, 8, 8), branch=1)


def test_added_keys_are_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
    )
    with pytest.raises(RecipeError, match="attention 'down_blocks.1.*added_kv_proj_dim=8"):
        BranchedUNet(unet)


def test_what_is_not_in_the_weights_is_refused(network: Network) -> None:
    unet = copy.deepcopy(network("sd").unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(RecipeError, match="FreeU is enabled"):
        BranchedUNet(unet)
    unet.disable_freeu()
    unet.fuse_qkv_projections()
    with pytest.raises(RecipeError, match="fused projections"):
        BranchedUNet(unet)
    unet = copy.deepcopy(network("sd").unet)
    BranchedUNet(unet)

    class Foreign:
        def __call__(self) -> None: ...

    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Foreign())
    with pytest.raises(RecipeError, match="has the processor Foreign; supported are AttnProcessor, "):
        BranchedUNet(unet)


def test_unfused_lora_is_refused(network: Network) -> None:
    unet = copy.deepcopy(network("sd").unet)
    check_no_lora(unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

    attention.to_q = Wrapped(attention.to_q)
    with pytest.raises(RecipeError, match=r"attn1.to_q.*pipe.fuse_lora\(\); pipe.unload_lora_weights\(\)"):
        BranchedUNet(unet)
    attention.to_q = attention.to_q.base_layer
    attention.lora_A = nn.Linear(1, 1)
    with pytest.raises(RecipeError, match="unfused LoRA weights .*lora_A"):
        check_no_lora(unet)
