from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from errata.calibration import nest
from errata.runtime.attention import QuantizedAttention, set_attention

SITES = ("query", "key", "value", "probabilities")
CASES: dict[str, tuple[dict[str, Any], list[int], dict[str, list[int]]]] = {
    # options of the attention, shape of the hidden states, shapes of the other arguments
    "image": ({"norm_num_groups": 4, "residual_connection": True, "bias": True}, [3, 16, 4, 5], {}),
    "tokens": ({"rescale_output_factor": 2.0}, [3, 20, 16], {}),
    "self mask": ({}, [3, 20, 16], {"attention_mask": [3, 1, 20]}),
    "cross": ({"cross_attention_dim": 12}, [3, 20, 16], {"encoder_hidden_states": [3, 7, 12]}),
    "cross, image": ({"cross_attention_dim": 12}, [3, 16, 4, 5], {"encoder_hidden_states": [3, 7, 12]}),
    "cross mask": (
        {"cross_attention_dim": 12},
        [3, 20, 16],
        {"encoder_hidden_states": [3, 7, 12], "attention_mask": [3, 1, 7]},
    ),
    "mask by query": (
        {"cross_attention_dim": 12},
        [3, 20, 16],
        {"encoder_hidden_states": [3, 7, 12], "attention_mask": [3, 20, 7]},
    ),
    "layer norm of the context": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm", "upcast_attention": True},
        [3, 20, 16],
        {"encoder_hidden_states": [3, 7, 12]},
    ),
    "group norm of the context": (
        {
            "cross_attention_dim": 12,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 4,
        },
        [3, 20, 16],
        {"encoder_hidden_states": [3, 7, 12], "attention_mask": [3, 1, 7]},
    ),
    "norms of query and key": ({"qk_norm": "layer_norm"}, [3, 20, 16], {}),
    "unscaled": ({"scale_qk": False}, [3, 20, 16], {}),
}


def keep(x: Tensor) -> Tensor:
    return x


def coarse(x: Tensor) -> Tensor:
    return (x * 8).round() / 8


def make(name: str) -> tuple[Attention, Tensor, dict[str, Tensor]]:
    options, shape, others = CASES[name]
    attention = Attention(query_dim=16, heads=2, dim_head=8, **options).eval()
    for norm in (attention.norm_q, attention.norm_k):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 3)
    arguments = {key: 2 * torch.randn(value) for key, value in others.items()}
    if "attention_mask" in arguments:
        arguments["attention_mask"] = torch.where(arguments["attention_mask"] > 0, 0.0, -10000.0)
        arguments["attention_mask"][..., 0] = 0.0  # nobody attends to nothing
    return attention, 2 * torch.randn(shape), arguments


def processors(name: str) -> list[Any]:
    """Those of diffusers that serve the case; each ignores something that the other does not."""
    if name == "norms of query and key":
        return [AttnProcessor2_0()]
    if name in ("unscaled", "mask by query"):
        return [AttnProcessor()]
    return [AttnProcessor(), AttnProcessor2_0()]


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_without_quantizers_it_is_diffusers_attention(name: str, is_fused: bool) -> None:
    attention, x, arguments = make(name)
    probabilities = None if is_fused else keep
    ours = QuantizedAttention(query=keep, key=keep, value=keep, probabilities=probabilities)
    for processor in processors(name):
        attention.set_processor(processor)
        expected = attention(x, **arguments)
        attention.set_processor(ours)
        torch.testing.assert_close(attention(x, **arguments), expected, rtol=0, atol=1e-6)
        if "attention_mask" in arguments:
            bare = attention(x, encoder_hidden_states=arguments.get("encoder_hidden_states"))
            assert (bare - expected).abs().max() > 1e-3


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["image", "cross mask", "norms of query and key"])
@torch.no_grad()
def test_every_site_is_read(name: str, site: str) -> None:
    attention, x, arguments = make(name)
    sites: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(SITES, keep)
    attention.set_processor(QuantizedAttention(**sites))
    expected = attention(x, **arguments)
    attention.set_processor(QuantizedAttention(**{**sites, site: coarse}))
    assert (attention(x, **arguments) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_quantized_is_what_the_products_read() -> None:
    """Query and key after their norms; probabilities after the mask."""
    attention, x, _ = make("norms of query and key")
    seen: dict[str, Tensor] = {}

    def see(site: str) -> Callable[[Tensor], Tensor]:
        return lambda value: seen.setdefault(site, value)

    attention.set_processor(QuantizedAttention(**{site: see(site) for site in SITES}))
    mask = torch.zeros(3, 1, 20)
    mask[..., 15:] = -10000.0
    attention(x, attention_mask=mask)
    query, key = (seen[site].unflatten(-1, (2, 8)).transpose(1, 2) for site in ("query", "key"))
    expected = (query @ key.transpose(-1, -2) * 8**-0.5 + mask[:, None]).softmax(dim=-1)
    torch.testing.assert_close(seen["probabilities"].unflatten(0, (3, 2)), expected, rtol=0, atol=1e-6)
    assert seen["probabilities"][..., 15:].abs().max() == 0
    norm: Any = attention.norm_q
    normed = norm(attention.to_q(x).unflatten(-1, (2, 8))).flatten(-2)
    torch.testing.assert_close(seen["query"], normed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pixel", "sd", "sdxl", "audioldm2", "k"])
@pytest.mark.parametrize("is_fused", [False, True])
@torch.no_grad()
def test_it_serves_every_attention_of_a_network(
    network: Callable[[str], Any], name: str, is_fused: bool
) -> None:
    case = network(name)
    expected = case.own_forward()
    probabilities = None if is_fused else keep
    ours = QuantizedAttention(query=keep, key=keep, value=keep, probabilities=probabilities)
    attentions = {path: module for path, module in case.unet.named_modules() if isinstance(module, Attention)}
    before = {path: module.processor for path, module in attentions.items()}
    try:
        for path in attentions:
            set_attention(case.unet, path, ours)
        output = case.unet(case.x, torch.as_tensor(case.time), **nest(case.cond)).sample
    finally:
        for path, module in attentions.items():
            del module._modules["processor"]
            module.processor = before[path]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_added_keys_are_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("SimpleCrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        cross_attention_dim=8,
    )
    attention = unet.mid_block.attentions[0]
    attention.set_processor(QuantizedAttention(query=keep, key=keep, value=keep, probabilities=keep))
    with pytest.raises(NotImplementedError, match="added_kv_proj_dim"):
        attention(torch.randn(1, 32, 4, 4), encoder_hidden_states=torch.randn(1, 3, 8))
