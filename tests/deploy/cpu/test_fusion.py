"""Blocks rewritten around int8 layers do what diffusers' blocks do around the same layers."""

import copy
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from errata.deploy.cpu import int8, native
from errata.deploy.cpu.attention import CPUAttention
from errata.deploy.cpu.feed_forward import FusedFeedForward
from errata.deploy.cpu.fusion import (
    FusedDownsample,
    FusedOutput,
    FusedResnet,
    FusedUpsample,
    embeds_time_only,
    fuse,
)
from errata.deploy.cpu.int8 import Int8Layer, OneDNNProduct, StepTable
from errata.deploy.cpu.transformer import FusedTransformer, FusedTransformerBlock
from errata.deploy.cpu.vnni import VNNIProduct
from errata.runtime.attention import QuantizedAttention
from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.layers import Geometry, replace_module
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

pytestmark = pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions")
STEPS = 3
SCALES = torch.tensor([0.002, 0.01, 0.05])  # differ 25-fold between steps
ZERO_POINTS = torch.tensor([100, 120, 140], dtype=torch.uint8)
PRODUCTS: dict[str, type[VNNIProduct | OneDNNProduct]] = {"vnni": VNNIProduct, "onednn": OneDNNProduct}
# Relative to the size of the output: rounding in float32, and codes that flip on a tie.
BOUND = 4e-3


def make_int8(
    block: Any, step_context: StepContext, widths: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Puts int8 layers with random codes into the place of all convolutions and linear layers of `block`."""
    for name, module in list(block.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear) or name == "time_emb_proj":
            continue
        inputs = module.weight.shape[1]
        parts = (widths or {}).get(name, (inputs,))
        fan_in = module.weight[0].numel()
        codes = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
        scales = torch.rand(len(parts), len(codes)) * 0.03 / fan_in**0.5 + 0.003 / fan_in**0.5
        scheme = LayerScheme(
            name=name,
            kind="conv2d" if isinstance(module, nn.Conv2d) else "linear",
            weight_bits=8,
            activation_bits=8,
            input_widths=parts,
        )
        tables = [StepTable(SCALES * (part + 1), ZERO_POINTS, step_context) for part in range(len(parts))]
        bias = None if module.bias is None else torch.randn(len(codes))
        kernel = "onednn" if native.product_obstacle() else "vnni"
        layer = Int8Layer(scheme, Geometry(module), codes, scales, bias, tables, product=PRODUCTS[kernel])
        replace_module(block, name, layer)


def compare(found: Callable[[int], Tensor], wanted: Callable[[int], Tensor]) -> None:
    """At every step the same, and at every other step something else."""
    outputs = [wanted(step) for step in range(STEPS)]
    for step in range(STEPS):
        got = found(step)
        bound = BOUND * rms(outputs[step])
        assert rms(got - outputs[step]) <= bound
        others = (rms(got - output) for other, output in enumerate(outputs) if other != step)
        assert min(others) > 10 * bound


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def at(
    step_context: StepContext, block: nn.Module, *args: Any, kind: Any = "full"
) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def call(step: int) -> Tensor:
        with step_context.at(step, kind=kind, time=float(step)):
            output: Tensor = block(*(arg[step] if isinstance(arg, list) else arg.clone() for arg in args))
        return output

    return call


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture(params=["native", "tensor operations"])
def norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled pass, and with what takes its place where there is no compiler."""
    if request.param == "tensor operations":
        monkeypatch.setattr(native, "obstacle", lambda: "switched off")
    elif native.obstacle():
        pytest.skip(native.obstacle())


RESNETS: dict[str, dict[str, Any]] = {
    "the same width": {"in_channels": 32, "out_channels": 32},
    "wider": {"in_channels": 32, "out_channels": 48},
    "of a concatenation": {"in_channels": 48, "out_channels": 32},
    "scaled": {"in_channels": 32, "out_channels": 32, "output_scale_factor": 1.5},
    "active embedding": {"in_channels": 32, "out_channels": 32, "skip_time_act": True},
    "without time": {"in_channels": 32, "out_channels": 32, "temb_channels": None},
}


@pytest.mark.parametrize("keeps_biases", [True, False])
@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet(name: str, keeps_biases: bool, norms: None) -> None:
    settings = {"temb_channels": 20, "groups": 8, **RESNETS[name]}
    block, step_context = ResnetBlock2D(**settings).eval(), StepContext()
    parts = {"conv1": (32, 16), "conv_shortcut": (32, 16)} if name == "of a concatenation" else None
    make_int8(block, step_context, parts)
    assert FusedResnet.is_fusible(block)
    fused = FusedResnet(block, step_context, keeps_biases=keeps_biases)
    x = channels_last(2, settings["in_channels"], 12, 12)
    embeddings = None if settings["temb_channels"] is None else embeddings_of(rows_differ=not keeps_biases)
    arguments = (x, [None] * STEPS if embeddings is None else embeddings)
    before = x.clone()
    compare(at(step_context, fused, *arguments), at(step_context, block, *arguments))
    compare(
        at(step_context, fused, *arguments), at(step_context, block, *arguments)
    )  # with the biases that were kept
    assert torch.equal(x, before)


def embeddings_of(*, rows_differ: bool) -> list[Tensor]:
    """The time embedding of every step, `(2, 20)`."""
    return [torch.randn(2 if rows_differ else 1, 20).expand(2, -1) * 3 for _ in range(STEPS)]


def test_an_input_that_is_still_needed_is_not_overwritten(norms: None) -> None:
    """A skip connection reads it later."""
    block, step_context = ResnetBlock2D(in_channels=32, temb_channels=None, groups=8).eval(), StepContext()
    make_int8(block, step_context)
    fused, x = FusedResnet(block, step_context, keeps_biases=False), channels_last(1, 32, 8, 8)
    before = x.clone()
    with torch.no_grad(), step_context.at(0):
        fused(x)
    assert torch.equal(x, before)


class End(nn.Module):
    """The end of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_norm_out = nn.GroupNorm(8, 32)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return output


def test_the_end_of_a_network(norms: None) -> None:
    end, step_context = End().eval(), StepContext()
    make_int8(end, step_context)
    fused = copy.deepcopy(end)
    assert FusedOutput.is_fusible(fused)
    for layer in (end.conv_out, fused.conv_out):
        for table in layer.tables:  # type: ignore[union-attr]
            table._context = step_context
    FusedOutput.into(fused)
    x = channels_last(2, 32, 12, 12)
    compare(at(step_context, fused, x), at(step_context, end, x))
    assert not FusedOutput.is_fusible(nn.Identity())


@pytest.mark.parametrize("kind", ["full", "cached"])
@pytest.mark.parametrize("name", ["conv1", "conv2", "conv_shortcut"])
def test_a_resnet_whose_output_is_corrected_in_cached_calls(name: str, kind: str, norms: None) -> None:
    block, step_context = (
        ResnetBlock2D(in_channels=32, out_channels=48, temb_channels=20, groups=8).eval(),
        StepContext(),
    )
    make_int8(block, step_context)
    plain = copy.copy(block)
    plain._modules = dict(block._modules)
    gain, shift = torch.rand(STEPS, 48) + 0.5, torch.randn(STEPS, 48) * 3
    layer = CorrectedOutput(block.get_submodule(name), gain, shift, step_context, is_conv=True)
    setattr(block, name, layer)
    fused = FusedResnet(block, step_context, keeps_biases=True)
    arguments = channels_last(2, 32, 10, 10), embeddings_of(rows_differ=False)
    compare(at(step_context, fused, *arguments, kind=kind), at(step_context, block, *arguments, kind=kind))
    uncorrected = at(step_context, plain, *arguments, kind=kind)(1)
    distance = rms(at(step_context, fused, *arguments, kind=kind)(1) - uncorrected) / rms(uncorrected)
    assert (distance > 10 * BOUND) == (kind == "cached")


@pytest.mark.parametrize("output_size", [None, (17, 13)])
def test_upsampling_repeats_codes_exactly(output_size: tuple[int, int] | None) -> None:
    block, step_context = Upsample2D(32, use_conv=True).eval(), StepContext()
    make_int8(block, step_context)
    assert FusedUpsample.is_fusible(block)
    x = channels_last(2, 32, 8, 6)
    for step in range(STEPS):
        with step_context.at(step):
            found, wanted = FusedUpsample(block)(x, output_size), block(x, output_size)
        assert torch.equal(found, wanted)


def test_downsampling_pads_with_the_zero_point() -> None:
    block, step_context = Downsample2D(32, use_conv=True, padding=0, name="op").eval(), StepContext()
    make_int8(block, step_context)
    assert FusedDownsample.is_fusible(block)
    x = channels_last(2, 32, 8, 6)
    for step in range(STEPS):
        with step_context.at(step):
            assert torch.equal(FusedDownsample(block)(x), block(x))


@pytest.mark.parametrize("has_tiles", [True, False])
@pytest.mark.parametrize(("channels", "inner", "has_bias"), [(64, 96, True), (40, 64, False), (96, 16, True)])
def test_feed_forward_gates_as_it_writes(
    channels: int, inner: int, has_bias: bool, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.product_obstacle():
        pytest.skip(native.product_obstacle())
    if has_tiles and not native.has_tiles():
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(native, "has_tiles", lambda: has_tiles)
    block = FeedForward(channels, inner_dim=inner, activation_fn="geglu", bias=has_bias).eval()
    step_context = StepContext()
    make_int8(block, step_context)
    block.net[2].tables = [StepTable(SCALES * 10, ZERO_POINTS, step_context)]
    x = 2 * torch.randn(2, 37, channels)
    wanted = [at(step_context, block, x)(step) for step in range(STEPS)]
    assert FusedFeedForward.is_fusible(block)
    fused = FusedFeedForward(block)
    compare(at(step_context, fused, x), lambda step: wanted[step])


def test_only_gates_of_whole_vectors_are_fused() -> None:
    if native.product_obstacle():
        pytest.skip(native.product_obstacle())
    for block, fits in (
        (FeedForward(32, inner_dim=32, activation_fn="geglu"), True),
        (FeedForward(32, inner_dim=24, activation_fn="geglu"), False),
        (FeedForward(32, inner_dim=32, activation_fn="gelu"), False),
        (FeedForward(32, inner_dim=32, activation_fn="geglu", final_dropout=True), False),
    ):
        make_int8(block, StepContext())
        assert FusedFeedForward.is_fusible(block) is fits


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("products", ["kernel", "bfloat16 where wide", "float32"])
def test_attention_over_pixels(heads: int, products: str, norms: None) -> None:
    width = 128  # of a head: wide enough for bfloat16
    attn = Attention(
        query_dim=128,
        heads=heads,
        dim_head=width // heads,
        norm_num_groups=8,
        bias=True,
        residual_connection=True,
    ).eval()
    step_context = StepContext()
    make_int8(attn, step_context)
    x = channels_last(2, 128, 6, 6)
    plain = QuantizedAttention(query=lambda x: x, key=lambda x: x, value=lambda x: x, probabilities=None)
    fused = CPUAttention()
    if products == "kernel" and not fused._has_kernel:
        pytest.skip("this CPU has no instructions for bfloat16")
    fused._has_kernel = products == "kernel"
    fused._has_bfloat16 = products != "float32"
    rounds = products == "kernel" or (products == "bfloat16 where wide" and heads == 1)
    attn.set_processor(plain)
    wanted = [at(step_context, attn, x)(step) for step in range(STEPS)]
    attn.set_processor(fused)
    for step in range(STEPS):
        found = at(step_context, attn, x)(step)
        error = rms(found - wanted[step]) / rms(wanted[step] - x)
        assert error <= (2e-2 if rounds else 5e-3)
        assert min(rms(found - w) for o, w in enumerate(wanted) if o != step) > 10 * rms(found - wanted[step])


def make_transformer(step_context: StepContext, **changes: Any) -> Transformer2DModel:
    settings: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 64}
    settings |= {"cross_attention_dim": 48, "norm_num_groups": 8} | changes
    model = Transformer2DModel(**settings).eval()
    make_int8(model, step_context)
    return model


def set_processors(model: nn.Module, processor: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"double_self_attention": True}, {"only_cross_attention": True}, {"activation_fn": "gelu"}],
)
def test_a_transformer_is_what_it_stands_for(
    changes: dict[str, Any], is_linear: bool, has_kernel: bool, norms: None
) -> None:
    step_context, fused_attention = StepContext(), CPUAttention()
    if has_kernel and not fused_attention._has_kernel:
        pytest.skip("this CPU has no instructions for bfloat16")
    fused_attention._has_kernel = has_kernel
    model = make_transformer(step_context, use_linear_projection=is_linear, **changes)
    set_processors(model, QuantizedAttention(query=_same, key=_same, value=_same, probabilities=None))
    x, context, mask = channels_last(2, 64, 6, 7), torch.randn(2, 9, 48), torch.ones(2, 9)
    mask[1, 4:] = 0
    # Without a mask, and with one in each of the two forms.
    arguments: dict[str, tuple[Any, ...]] = {
        name: (x, context, None, None, None, None, None, given, False)
        for name, given in (("none", None), ("mask", mask), ("bias", (1 - mask[:, None]) * -10000.0))
    }
    double = "double_self_attention" in changes
    arguments = {"none": (x, *[None] * 7, False)} if double else arguments

    def outputs(module: nn.Module) -> dict[str, list[Tensor]]:
        return {
            name: [at_once(step_context, module, given, step) for step in range(STEPS)]
            for name, given in arguments.items()
        }

    wanted = outputs(model)
    if not double:
        assert rms(wanted["mask"][1] - wanted["none"][1]) > 10 * BOUND * rms(wanted["none"][1] - x)
    whole = nn.Module()
    whole.time_embedding, whole.model = nn.Identity(), model
    fuse(whole, step_context)
    assert type(whole.model) is FusedTransformer
    assert type(whole.model.transformer_blocks[0]) is FusedTransformerBlock
    set_processors(whole, fused_attention)
    bound = 3e-2 if has_kernel else BOUND  # of several attentions, in bfloat16
    for name, found in outputs(whole.model).items():
        for step in range(STEPS):
            error = rms(found[step] - wanted[name][step]) / rms(wanted[name][step] - x)
            assert error <= bound
            assert min(rms(found[step] - w) for o, w in enumerate(wanted[name]) if o != step) > 10 * (
                error * rms(wanted[name][step] - x)
            )


@torch.no_grad()
def at_once(step_context: StepContext, module: nn.Module, arguments: tuple[Any, ...], step: int) -> Tensor:
    with step_context.at(step, kind="full", time=float(step)):
        output: Tensor = module(*arguments)[0]
    return output


def test_options_of_attentions_are_refused_by_name() -> None:
    step_context = StepContext()
    whole: Any = nn.Module()
    whole.time_embedding, whole.model = nn.Identity(), make_transformer(step_context)
    fuse(whole, step_context)
    x, context = channels_last(1, 64, 4, 4), torch.randn(1, 3, 48)
    with step_context.at(1), pytest.raises(NotImplementedError, match="gligen.*backend='reference'"):
        whole.model(x, context, cross_attention_kwargs={"gligen": {}, "scale": 1.0})


@pytest.mark.parametrize("crosses", [True, False])
@pytest.mark.parametrize("quantizes_alike", [True, False])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_attention_between_sequences_quantizes_each_input_once(
    crosses: bool, quantizes_alike: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = Attention(query_dim=64, cross_attention_dim=48 if crosses else None, heads=4, dim_head=16).eval()
    step_context = StepContext()
    make_int8(attn, step_context)
    if not quantizes_alike:
        attn.to_v.tables = [StepTable(SCALES * 2, ZERO_POINTS, step_context)]
    x, context = torch.randn(2, 10, 64), torch.randn(2, 5, 48) if crosses else None
    arguments = (x,) if context is None else (x, context)
    attn.set_processor(QuantizedAttention(query=_same, key=_same, value=_same, probabilities=None))
    wanted = at(step_context, attn, *arguments)(1)
    fused = CPUAttention()
    if has_kernel and not fused._has_kernel:
        pytest.skip("this CPU has no instructions for bfloat16")
    fused._has_kernel = has_kernel
    attn.set_processor(fused)
    place, name = (int8, "quantize_to_uint8") if native.obstacle() else (native, "quantize")
    quantize = Mock(wraps=getattr(place, name))
    monkeypatch.setattr(place, name, quantize)
    found = at(step_context, attn, *arguments)(1)
    if has_kernel:
        assert rms(found - wanted) <= 2e-2 * rms(wanted)
    else:
        assert torch.equal(found, wanted)
    projections = {(True, True): 2, (False, True): 1}.get((crosses, quantizes_alike), 3)
    assert quantize.call_count == projections + (not has_kernel)  # the kernel quantizes the output by itself


def _same(x: Tensor) -> Tensor:
    return x


def test_what_is_replaced_and_what_stays() -> None:
    step_context = StepContext()
    whole = nn.Module()
    whole.time_embedding = nn.Identity()
    whole.plain = ResnetBlock2D(in_channels=32, temb_channels=20, groups=8)
    whole.int8 = ResnetBlock2D(in_channels=32, temb_channels=20, groups=8)
    whole.up = ResnetBlock2D(in_channels=32, temb_channels=20, groups=8, up=True)
    whole.shifted = ResnetBlock2D(
        in_channels=32, temb_channels=20, groups=8, time_embedding_norm="scale_shift"
    )
    whole.resampled = Downsample2D(32, use_conv=True, padding=1, name="op")
    for block in (whole.int8, whole.up, whole.shifted, whole.resampled):
        make_int8(block, step_context)
    fuse(whole, step_context)
    kinds = {name: type(block).__name__ for name, block in whole.named_children()}
    assert kinds["int8"] == "FusedResnet"
    assert kinds["plain"] == kinds["up"] == kinds["shifted"] == "ResnetBlock2D"
    assert kinds["resampled"] == "Downsample2D"


@pytest.mark.parametrize("condition", ["class_embedding", "add_embedding", "cond_proj"])
def test_biases_are_kept_for_embeddings_of_time_alone(condition: str) -> None:
    unet = nn.Module()
    unet.time_embedding = nn.Module()
    assert embeds_time_only(unet)
    setattr(unet.time_embedding if condition == "cond_proj" else unet, condition, nn.Identity())
    assert not embeds_time_only(unet)


def test_the_time_embedding_does_not_depend_on_the_number_of_rows() -> None:
    step_context = StepContext()
    unet: Any = nn.Module()
    block = TimestepEmbedding(64, 256)
    unet.time_embedding = block
    fuse(unet, step_context)
    embedding = unet.time_embedding
    assert [name for name, _ in embedding.named_parameters()] == [
        name for name, _ in block.named_parameters()
    ]
    rows = torch.randn(1, 64).repeat(37, 1)
    with step_context.at(0, time=3.0):
        many, one = embedding(rows), embedding(rows[:1])
    assert torch.equal(many, one.expand(37, -1))
    torch.testing.assert_close(many, block(rows))
    differing = torch.randn(5, 64)  # outside of a run every row may have a time of its own
    torch.testing.assert_close(embedding(differing), block(differing), rtol=0, atol=0)
