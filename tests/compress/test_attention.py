import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from errata.compress.attention import QuantizedAttention


def keep(x: Tensor) -> Tensor:
    return x


def coarse(x: Tensor) -> Tensor:
    return (x * 8).round() / 8


@pytest.fixture
def attention() -> Attention:
    return Attention(
        query_dim=16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True
    ).eval()


@pytest.mark.parametrize("is_fused", [False, True])
@torch.no_grad()
def test_without_quantizers_it_is_diffusers_attention(attention: Attention, is_fused: bool) -> None:
    x = torch.randn(3, 16, 4, 5) * 2
    attention.set_processor(AttnProcessor())
    expected = attention(x)
    probabilities = None if is_fused else keep
    attention.set_processor(QuantizedAttention(query=keep, key=keep, value=keep, probabilities=probabilities))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", ["query", "key", "value", "probabilities"])
@torch.no_grad()
def test_every_site_is_read(attention: Attention, site: str) -> None:
    x = torch.randn(3, 16, 4, 5) * 2
    sites = dict.fromkeys(("query", "key", "value", "probabilities"), keep)
    attention.set_processor(QuantizedAttention(**sites))
    expected = attention(x)
    attention.set_processor(QuantizedAttention(**{**sites, site: coarse}))
    assert (attention(x) - expected).abs().max() > 1e-3


def test_masks_are_refused(attention: Attention) -> None:
    attention.set_processor(QuantizedAttention(query=keep, key=keep, value=keep, probabilities=keep))
    with pytest.raises(NotImplementedError, match="masks are not supported"):
        attention(torch.randn(1, 20, 16), attention_mask=torch.zeros(1, 1, 20))
