import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from errata.compress import Recipe
from errata.compress.quantize import observed_network, step_sketch
from errata.compress.quantize.observed_network import (
    ObservedAttention,
    observed_copy,
    observing_dtype,
    watching,
)
from errata.compress.quantize.step_sketch import StepSketch
from errata.runtime.scheme import AttentionScheme, Scheme, sites_of

HEADS, WIDTH, TOKENS, ROWS = 4, 8, 1024, 6


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().size() // value.element_size())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with torch.no_grad(), Largest() as seen:
        yield seen


def attention(sketch: StepSketch, **options: Any) -> Attention:
    torch.manual_seed(0)
    module = Attention(HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, **options).eval()
    with torch.no_grad():
        module.to_q.weight *= 8  # probabilities that differ
    module.set_processor(ObservedAttention(AttentionScheme(name="a", bits=8), sketch))
    return module


def test_no_product_of_rows_heads_and_squared_tokens_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sketch = torch.randn(ROWS, TOKENS, HEADS * WIDTH), StepSketch(samples=ROWS)
    module = attention(sketch)
    for limit in (2**18, 2**20):
        monkeypatch.setattr(observed_network, "PROBABILITIES", limit)
        with largest() as seen:
            module(x)
        # The fused kernel's own scratch is a few rows of keys for each thread.
        assert limit // 2 <= seen.elements <= max(limit, 2 * x.numel())
        assert seen.elements < ROWS * HEADS * TOKENS**2 / 20
    with largest() as seen:  # the measure does see what is whole
        module.get_attention_scores(
            torch.randn(ROWS * HEADS, TOKENS, 8), torch.randn(ROWS * HEADS, TOKENS, 8)
        )
    assert seen.elements >= ROWS * HEADS * TOKENS**2


@pytest.mark.parametrize("slices", [2**10, 2**13, 2**22])
@pytest.mark.parametrize("is_masked", [False, True])
def test_slices_show_what_the_whole_softmax_holds(
    slices: int, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observed_network, "PROBABILITIES", slices)
    monkeypatch.setattr(step_sketch, "VALUES_PER_STEP", 10**7)
    sketch = StepSketch(samples=2)
    module = attention(sketch, cross_attention_dim=16)
    x, text = torch.randn(2, 50, HEADS * WIDTH), torch.randn(2, 30, 16)
    bias = -9.0 * (torch.rand(2, 1, 30) > 0.5) if is_masked else None
    sketch.expect(2)
    with torch.no_grad():
        output = module(x, text, attention_mask=bias)
        query, key = (module.head_to_batch_dim(part) for part in (module.to_q(x), module.to_k(text)))
        prepared = None if bias is None else module.prepare_attention_mask(bias, 30, 2)
        whole = module.get_attention_scores(query, key, prepared)
    seen = torch.cat(sketch._sites["a.probabilities"].values)
    torch.testing.assert_close(seen.sort().values, whole.flatten().sort().values)
    value = module.head_to_batch_dim(module.to_v(text))
    expected = module.to_out[0](module.batch_to_head_dim(whole @ value))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_of_many_queries_some_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range from an eighth of the queries is that of all, within two candidates."""
    monkeypatch.setattr(step_sketch, "VALUES_PER_STEP", 16384)
    x = torch.randn(ROWS, TOKENS, HEADS * WIDTH)
    found = []
    for queries in (TOKENS // 8, TOKENS):
        monkeypatch.setattr(observed_network, "QUERIES", queries)
        sketch = StepSketch(samples=ROWS)
        sketch.expect(ROWS)
        with torch.no_grad():
            attention(sketch)(x)
        counts = sketch._sites["a.probabilities"].counts
        assert counts is not None
        assert int(counts.sum()) == pytest.approx(4 * 16384, rel=0.01)
        scale, zero_point = sketch.choose_range("a.probabilities", bits=8, from_zero=True)
        assert zero_point == 0
        found.append(float(scale))
    assert found[0] == pytest.approx(found[1], rel=0.1)


def ranges_in(dtype: torch.dtype, pipe: DiffusionPipeline) -> dict[str, Tensor]:
    scheme = Scheme.of(pipe.unet, Recipe.named("w8a8"), branch=0)
    copied, sketch = observed_copy(pipe.unet, dtype), StepSketch(samples=4)
    sketch.expect(4)
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), watching(copied, scheme, sketch):
        copied(x, 400)
    return {
        site.name: sketch.choose_range(site.name, bits=8, from_zero=site.from_zero)[0]
        for site in sites_of(scheme)
    }


def test_ranges_seen_in_bfloat16_are_those_of_float32(digits: DiffusionPipeline) -> None:
    exact = ranges_in(torch.float32, digits)
    ratios = torch.stack([scale / exact[name] for name, scale in ranges_in(torch.bfloat16, digits).items()])
    # A candidate more or less is 2 % of the full range; on this input, few ranges move at all.
    assert ratios.log().abs().mean() < 0.01
    assert ratios.log().abs().max() < 0.15


def test_a_copy_has_the_other_type_and_leaves_the_network_alone(tiny_pipeline: DDIMPipeline) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet).train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    copied = observed_copy(unet, torch.bfloat16)
    assert {value.dtype for value in copied.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in copied.modules())
    assert unet.training
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(copied.state_dict()[name], value.bfloat16())


def test_frequencies_of_the_time_embedding_stay_float32() -> None:
    unet = UNet2DModel(
        sample_size=8,
        time_embedding_type="fourier",
        block_out_channels=(32,),
        down_block_types=("SkipDownBlock2D",),
        up_block_types=("SkipUpBlock2D",),
        layers_per_block=1,
    )
    copied = observed_copy(unet, torch.bfloat16)
    frequencies = copied.get_parameter("time_proj.weight")
    assert frequencies.dtype is torch.float32
    assert torch.equal(frequencies, unet.get_parameter("time_proj.weight"))
    with torch.no_grad():
        assert copied(torch.randn(1, 3, 8, 8).bfloat16(), 3.7).sample.dtype is torch.bfloat16


def test_small_networks_and_slow_devices_are_observed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = nn.Linear(1024, 1024), nn.Linear(8, 8)
    for is_fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_fast=is_fast: is_fast)
        assert observing_dtype(large) is (torch.bfloat16 if is_fast else torch.float32)
        assert observing_dtype(small) is torch.float32
