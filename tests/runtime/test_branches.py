"""Cached calls: the shallow branch of every kind of UNet, at every cut."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.errors import RecipeError
from errata.runtime.layers import replace_module
from errata.runtime.unet import BranchedUNet

CACHEABLE = ("pixel", "labels", "resnet", "sd", "nomid", "sdxl", "upscaler", "audioldm2")
Network = Callable[[str], Any]


def features(model: BranchedUNet, case: Any, branch: int) -> tuple[Tensor, Tensor]:
    output, feature = model.full(case.x, case.time, case.cond, branch=branch)
    assert feature is not None
    return output, feature


@pytest.mark.parametrize("name", CACHEABLE)
@torch.no_grad()
def test_cached_with_its_own_feature_equals_full_at_every_cut(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(case.unet)
    assert model.max_branch == case.num_up_resnets
    for branch in range(1, model.max_branch + 1):
        output, feature = features(model, case, branch)
        cached = model.cached(case.x, case.time, case.cond, feature, branch=branch)
        assert torch.equal(cached, output)
        other = model.cached(case.x, case.time, case.cond, 2 * feature, branch=branch)
        assert (other - output).abs().max() > 1e-3, branch  # the feature is read
        moved = model.cached(case.x + 1, case.time, case.cond, feature, branch=branch)
        assert (moved - output).abs().max() > 1e-3, branch  # and the input still matters
        later = model.cached(case.x, case.time + 100, case.cond, feature, branch=branch)
        assert (later - output).abs().max() > 1e-5, branch  # and so does the time


@pytest.mark.parametrize("name", CACHEABLE)
@torch.no_grad()
def test_a_feature_of_another_sample_gives_another_prediction(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(case.unet)
    for branch in range(1, model.max_branch + 1):
        output, _ = features(model, case, branch)
        _, other = model.full(case.x.flip(0) + 0.5, case.time, case.cond, branch=branch)
        assert other is not None
        cached = model.cached(case.x, case.time, case.cond, other, branch=branch)
        assert (cached - output).abs().max() > 1e-4, branch


@pytest.mark.parametrize("name", ["pixel", "resnet", "sd", "sdxl"])
@torch.no_grad()
def test_cached_calls_follow_deepcache(network: Network, name: str) -> None:
    """An independent reference: block by block, by hand, with the skip inputs of the new sample."""
    case = network(name)
    model = BranchedUNet(case.unet)
    x, time = case.x + 0.3, case.time - 20
    for branch in range(1, model.max_branch + 1):
        _, feature = features(model, case, branch)
        expected = by_hand(case.unet, x, time, case.cond, feature, branch)
        cached = model.cached(x, time, case.cond, feature, branch=branch)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)
        own, _ = features(model, case, branch)
        assert (own - expected).abs().max() > 1e-3


def by_hand(
    unet: Any, x: Tensor, time: float, cond: dict[str, Tensor], feature: Tensor, branch: int
) -> Tensor:
    """Every layer in order; the first up resnets are passed over, and `feature` enters the others."""
    time_embedding = unet.time_embedding(unet.time_proj(torch.full((x.shape[0],), time)))
    if "added_cond_kwargs.text_embeds" in cond:
        ids = unet.add_time_proj(cond["added_cond_kwargs.time_ids"].flatten()).reshape(x.shape[0], -1)
        added = torch.cat([cond["added_cond_kwargs.text_embeds"], ids], dim=-1)
        time_embedding = time_embedding + unet.add_embedding(added)
    tokens, mask = cond.get("encoder_hidden_states"), cond.get("encoder_attention_mask")
    if mask is not None:
        mask = (1 - mask.float())[:, None] * -10000.0

    def layer(block: Any, index: int, hidden: Tensor) -> Tensor:
        hidden = block.resnets[index](hidden, time_embedding)
        if not hasattr(block, "attentions"):
            return hidden
        attention = block.attentions[index]
        if tokens is None:
            output: Tensor = attention(hidden)
        else:
            output = attention(
                hidden, encoder_hidden_states=tokens, encoder_attention_mask=mask, return_dict=False
            )[0]
        return output

    hidden = unet.conv_in(x)
    skips = [hidden]
    for block in unet.down_blocks:
        for index in range(len(block.resnets)):
            hidden = layer(block, index, hidden)
            skips.append(hidden)
        if block.downsamplers is not None:
            sampler = block.downsamplers[0]
            is_resnet = "Resnet" in type(sampler).__name__
            hidden = sampler(hidden, time_embedding) if is_resnet else sampler(hidden)
            skips.append(hidden)

    hidden, left = feature, sum(len(block.resnets) for block in unet.up_blocks)
    for block in unet.up_blocks:
        for index in range(len(block.resnets)):
            skip = skips.pop()
            if left <= branch:
                hidden = layer(block, index, torch.cat([hidden, skip], dim=1))
            left -= 1
        if block.upsamplers is not None and left < branch:
            sampler = block.upsamplers[0]
            if "Resnet" in type(sampler).__name__:
                hidden = sampler(hidden, time_embedding)
            else:
                hidden = sampler(hidden, tuple(skips[-1].shape[2:]))
    output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return output


@torch.no_grad()
def test_a_cached_call_runs_the_shallow_branch_only(network: Network) -> None:
    case = network("pixel")
    model = BranchedUNet(case.unet)
    assert ran_convolutions(model, case, 2) == {
        "down_blocks.0.resnets.0",
        "up_blocks.2.resnets.1",
        "up_blocks.2.resnets.2",
    }
    assert ran_convolutions(model, case, 5) == {
        "down_blocks.0.resnets.0",
        "down_blocks.0.resnets.1",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
        "up_blocks.1.resnets.2",
        "up_blocks.1.upsamplers.0",
        "up_blocks.2.resnets.0",
        "up_blocks.2.resnets.1",
        "up_blocks.2.resnets.2",
    }


def ran_convolutions(model: BranchedUNet, case: Any, branch: int) -> set[str]:
    _, feature = features(model, case, branch)
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.unet.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model.cached(case.x, case.time, case.cond, feature, branch=branch)
    for handle in handles:
        handle.remove()
    assert {"conv_in", "conv_out"} <= ran
    return {name.rpartition(".")[0] for name in ran} - {""}


@pytest.mark.parametrize("name", ["sd", "audioldm2"])
@torch.no_grad()
def test_deep_modules_are_never_called(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(copy.deepcopy(case.unet))
    _, feature = features(model, case, 1)
    expected = model.cached(case.x, case.time, case.cond, feature, branch=1)

    class Bomb(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            raise AssertionError("a deep module was called")

    unet = model.unet
    unet.mid_block = Bomb()
    for blocks in (unet.down_blocks, unet.up_blocks[:-1]):
        for block in blocks:
            for index in range(len(block.resnets)):
                block.resnets[index] = Bomb()
    for index in range(len(unet.up_blocks[-1].resnets) - 1):
        unet.up_blocks[-1].resnets[index] = Bomb()
    assert torch.equal(model.cached(case.x, case.time, case.cond, feature, branch=1), expected)
    with pytest.raises(AssertionError, match="a deep module was called"):
        model.full(case.x, case.time, case.cond, branch=1)


@pytest.mark.parametrize("name", ["pixel", "sd", "audioldm2"])
@torch.no_grad()
def test_rows_of_a_guided_batch_are_independent(network: Network, name: str) -> None:
    case = network(name)
    model = BranchedUNet(case.unet)
    for branch in (1, 4):
        _, feature = features(model, case, branch)
        both = model.cached(case.x + 1, case.time, case.cond, feature, branch=branch)
        for row in range(2):
            cond = {name: value[row : row + 1] for name, value in case.cond.items()}
            alone = model.cached(
                case.x[row : row + 1] + 1, case.time, cond, feature[row : row + 1], branch=branch
            )
            torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)
        assert (both[0] - both[1]).abs().max() > 1e-3


@torch.no_grad()
def test_nothing_is_left_on_the_network(network: Network) -> None:
    case = network("sd")
    before = list(case.unet.state_dict()), [name for name, _ in case.unet.named_modules()]
    model = BranchedUNet(case.unet)
    _, feature = features(model, case, 4)
    output = model.cached(case.x, case.time, case.cond, feature, branch=4)
    assert (list(case.unet.state_dict()), [name for name, _ in case.unet.named_modules()]) == before
    assert not any(module._forward_pre_hooks for module in case.unet.modules())
    assert list(model.state_dict()) == [f"unet.{name}" for name in before[0]]
    twin = copy.deepcopy(model).double()
    shifted = twin.cached(case.x.double(), case.time, double(case.cond), feature.double(), branch=4)
    torch.testing.assert_close(shifted.float(), output, rtol=0, atol=1e-4)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model.cached(case.x, case.time, case.cond, feature, branch=4), output)


def double(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in cond.items()}


@torch.no_grad()
def test_a_layer_replaced_later_is_the_one_that_runs(network: Network) -> None:
    case = network("pixel")
    model = BranchedUNet(copy.deepcopy(case.unet))
    _, feature = features(model, case, 2)
    before = model.cached(case.x, case.time, {}, feature, branch=2)
    for name in ("conv_in", "up_blocks.2.resnets.2.conv1"):
        layer = copy.deepcopy(model.unet.get_submodule(name))
        layer.weight.mul_(2)
        replace_module(model.unet, name, layer)
        after = model.cached(case.x, case.time, {}, feature, branch=2)
        assert (after - before).abs().max() > 1e-3
        before = after


@torch.no_grad()
def test_a_forward_bound_by_offloading_hooks_does_not_reach_cached_calls(network: Network) -> None:
    """accelerate puts a wrapped forward on the module itself; on the view it would run everything."""
    case = network("pixel")
    unet = copy.deepcopy(case.unet)
    unet.forward = functools.partial(type(unet).forward, unet)
    model = BranchedUNet(unet)
    assert "up_blocks.0.resnets.0" not in ran_convolutions(model, case, 2)


@torch.no_grad()
def test_a_feature_from_elsewhere_is_refused(network: Network) -> None:
    case = network("pixel")
    model = BranchedUNet(case.unet)
    _, feature = features(model, case, 3)
    with pytest.raises(
        ValueError, match=r"the feature has shape \[2, 24, 8, 8\]; branch=1 .* reads \[2, 16, …\]"
    ):
        model.cached(case.x, case.time, {}, feature, branch=1)
    with pytest.raises(ValueError, match="the feature has shape .*; branch=3 at a batch of 1"):
        model.cached(case.x[:1], case.time, {}, feature, branch=3)


@torch.no_grad()
def test_control_residuals_are_added_once(network: Network) -> None:
    case = network("sd")
    model = BranchedUNet(case.unet)
    shapes: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: shapes.extend(output[1]))
        for block in case.unet.down_blocks
    ]
    case.own_forward()
    for handle in handles:
        handle.remove()
    first = case.unet.conv_in(case.x)
    residuals = {
        f"down_block_additional_residuals.{index}": torch.randn_like(value)
        for index, value in enumerate([first, *shapes])
    }
    residuals["mid_block_additional_residual"] = torch.randn_like(shapes[-1])
    cond = case.cond | residuals
    expected = case.own_forward(cond=cond)
    assert (expected - case.own_forward()).abs().max() > 0.01
    for branch in range(1, model.max_branch + 1):
        output, feature = model.full(case.x, case.time, cond, branch=branch)
        assert feature is not None
        assert torch.equal(output, expected)
        cached = model.cached(case.x, case.time, cond, feature, branch=branch)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_adapter_residuals_are_served_in_full_calls_only(network: Network) -> None:
    case = network("sd")
    model = BranchedUNet(case.unet)
    sizes = [(8, 5, 3), (16, 3, 2), (16, 3, 2)]
    states = [torch.randn(2, *size) for size in sizes]
    cond = {f"down_intrablock_additional_residuals.{index}": state for index, state in enumerate(states)}
    cond["down_intrablock_additional_residuals.0"] = torch.randn(2, 8, 9, 6)
    cond["down_intrablock_additional_residuals.1"] = torch.randn(2, 16, 5, 3)
    own = case.unet(case.x, case.time, **case.cond, down_intrablock_additional_residuals=list(cond.values()))
    output, feature = model.full(case.x, case.time, case.cond | cond, branch=1)
    assert torch.equal(output, own.sample)
    assert feature is not None
    with pytest.raises(RecipeError, match="a T2I adapter"):
        model.cached(case.x, case.time, case.cond | cond, feature, branch=1)
