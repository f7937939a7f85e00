"""A loaded network is rewritten for the CPU: blocks around int8 layers, in place of diffusers' own.

They save passes over memory:

- Normalization, activation and quantization are one operation (`norms`), in residual blocks and at the end of
  the network. It also makes the codes that the shortcut of a residual block reads.
- The time embedding's projection is added by the first convolution, as its bias. Where the embedding depends
  on the time alone, that bias is kept for every time that was evaluated.
- Nearest-neighbour upsampling and zero padding are done on the codes, a quarter of the bytes: they commute
  with quantization, padded zeros being the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cpu import native, recording
from errata.deploy.cpu.feed_forward import FusedFeedForward
from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.cpu.norms import normed_codes
from errata.deploy.cpu.transformer import FusedTransformer, FusedTransformerBlock
from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.layers import replace_module
from errata.runtime.step_context import StepContext
from errata.runtime.unet import times_of


def fuse(unet: nn.Module, context: StepContext) -> dict[str, str]:
    """Replace in `unet` itself whatever can be fused; names of layers stay.

    Float convolutions that are left get channels_last weights, so that everything is in one memory format.

    Returns:
        For the layers around which something was fused: what, in a few words.
    """
    keeps_biases = embeds_time_only(unet)
    in_one_pass = "normalized, activated and quantized " + (
        f"by tensor operations: {native.obstacle()}" if native.obstacle() else "in one native pass"
    )
    told: dict[str, str] = {}
    for name, module in list(unet.named_modules()):
        if FusedResnet.is_fusible(module):
            replace_module(unet, name, FusedResnet(module, context, keeps_biases=keeps_biases))
            told |= dict.fromkeys((f"{name}.conv1", f"{name}.conv2"), f"input {in_one_pass}")
        elif FusedUpsample.is_fusible(module):
            replace_module(unet, name, FusedUpsample(module))
            told[f"{name}.conv"] = "upsampled as codes"
        elif FusedDownsample.is_fusible(module):
            replace_module(unet, name, FusedDownsample(module))
            told[f"{name}.conv"] = "padded as codes"
        elif FusedTransformer.is_fusible(module):
            replace_module(unet, name, FusedTransformer(module))
            told[f"{name}.proj_in"] = f"input {in_one_pass}"
        elif FusedTransformerBlock.is_fusible(module):
            replace_module(unet, name, FusedTransformerBlock(module))
        elif FusedFeedForward.is_fusible(module):
            replace_module(unet, name, FusedFeedForward(module))
            told |= {
                f"{name}.net.0.proj": "gated as it is written",
                f"{name}.net.2": "input written as codes",
            }
    if keeps_biases and OneTimeEmbedding.is_fusible(unet.time_embedding):  # type: ignore[arg-type]
        unet.time_embedding = OneTimeEmbedding(unet.time_embedding, context)
    if FusedOutput.is_fusible(unet):
        FusedOutput.into(unet)
        told["conv_out"] = f"input {in_one_pass}"
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return told


def embeds_time_only(unet: Any) -> bool:
    """Return whether the embedding that ResNet blocks get follows from the time of the step alone."""
    conditions = ("class_embedding", "add_embedding", "aug_emb")
    is_plain = all(getattr(unet, name, None) is None for name in conditions)
    return is_plain and getattr(unet.time_embedding, "cond_proj", None) is None


def embedding_of(unet: Any, time: float) -> Tensor:
    """Return the embedding of a time, `(1, D)`, in a network that embeds nothing else."""
    times = times_of(torch.empty(1), time)
    embedded: Tensor = unet.time_embedding(unet.time_proj(times).to(unet.dtype))
    activation = getattr(unet, "time_embed_act", None)
    return embedded if activation is None else activation(embedded)


class OneTimeEmbedding(nn.Module):
    """The time embedding of one row, in place of equal ones for all rows.

    A product of matrices rounds otherwise for another number of rows, and what follows from an embedding is
    kept for its time (`FusedResnet`): without this, images would depend on the size of the first batch. It
    stands in for a `TimestepEmbedding`, whose layers it shares under the same names.

    Args:
        block: one that `is_fusible`.
        context: tells the time that is evaluated, if all rows have the same.
    """

    def __init__(self, block: Any, context: StepContext) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = block.linear_1, block.linear_2
        self.act, self.post_act = block.act, block.post_act
        self._context = context

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it is one that gets nothing but the time."""
        return isinstance(block, TimestepEmbedding) and block.cond_proj is None

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        """Map `(B, C)` to `(B, D)`, as the block."""
        is_alike = self._context.time is not None
        embedded: Tensor = self.linear_1(sample[:1] if is_alike else sample)
        embedded = self.linear_2(embedded if self.act is None else self.act(embedded))
        embedded = embedded if self.post_act is None else self.post_act(embedded)
        return embedded.expand(len(sample), -1) if is_alike else embedded


class FusedResnet(nn.Module):
    """Stand-in for a `ResnetBlock2D`, whose layers it shares under the same names.

    Args:
        block: one that `is_fusible`.
        context: tells the time that is evaluated.
        keeps_biases: whether the time embedding follows from that time, for all rows alike.
    """

    def __init__(self, block: Any, context: StepContext, *, keeps_biases: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = block.conv1, block.conv2
        self.time_emb_proj = block.time_emb_proj
        self.conv_shortcut = block.conv_shortcut
        self.skip_time_act: bool = block.skip_time_act
        self.output_scale_factor: float = block.output_scale_factor
        self._context = context
        self._keeps_biases = keeps_biases
        self._embeddings: dict[tuple[float, bool], Tensor] = {}

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it is a plain ResNet block whose convolutions are int8 layers."""
        return (
            isinstance(block, ResnetBlock2D)
            and block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and isinstance(block.nonlinearity, nn.SiLU)
            and isinstance(inner(block.conv1), Int8Layer)
            and isinstance(inner(block.conv2), Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map `(B, C, H, W)` and `(B, D)` to `(B, C', H, W)`, as the block."""
        shortcut = inner(self.conv_shortcut)
        raw = shortcut if isinstance(shortcut, Int8Layer) else None
        codes, raw_codes = normed_codes(input_tensor, self.norm1, inner(self.conv1), silu=True, raw=raw)
        h = self._first(codes, temb)
        codes, _ = normed_codes(h, self.norm2, inner(self.conv2), silu=True)
        if raw is not None:
            residual = product(self.conv_shortcut, raw_codes)
        else:
            residual = input_tensor if shortcut is None else self.conv_shortcut(input_tensor)
        output = product(self.conv2, codes, residual)
        return output if self.output_scale_factor == 1 else output.div_(self.output_scale_factor)

    def _first(self, codes: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        if temb is None:
            return product(self.conv1, codes)
        time = self._context.time if self._keeps_biases else None
        if time is not None and not _is_corrected(self.conv1):
            return inner(self.conv1).product(codes, self._kept(temb, time, with_bias=True))
        output = product(self.conv1, codes)
        if time is not None and not native.obstacle():
            return native.adjust(output, self._kept(temb, time, with_bias=False))
        projected = self._projected(temb)
        if native.obstacle():
            return output.add_(projected[:, :, None, None])
        return native.adjust(output, projected.expand(len(output), -1).contiguous(), by_sample=True)

    def _kept(self, temb: Tensor, time: float, *, with_bias: bool) -> Tensor:
        """Return the projected embedding of a time, `(C',)`, with the bias of `conv1` or not; it is kept."""
        if (time, with_bias) not in self._embeddings:
            self.prepare(temb, time)
        if (recorder := recording.active()) is not None:
            own = self._embeddings
            recorder.declare(own[time, with_bias], lambda moment: own[moment, with_bias])
        return self._embeddings[time, with_bias]

    def prepare(self, temb: Tensor, time: float) -> None:
        """Keep what follows from the embedding of a time, the first row of `temb`, `(B, D)`."""
        if self._keeps_biases and (time, True) not in self._embeddings:  # programs know where it is
            self._embeddings |= self._made(temb, time)

    def is_prepared(self, temb: Tensor, time: float) -> bool:
        """Return whether what is kept for a time, if anything is, follows from that embedding."""
        made = self._made(temb, time)
        return all(torch.equal(made[key], self._embeddings.get(key, made[key])) for key in made)

    def _made(self, temb: Tensor, time: float) -> dict[tuple[float, bool], Tensor]:
        projected, bias = self._projected(temb[:1])[0], inner(self.conv1).bias
        return {(time, False): projected, (time, True): projected if bias is None else projected + bias}

    def _projected(self, temb: Tensor) -> Tensor:
        projected: Tensor = self.time_emb_proj(temb if self.skip_time_act else functional.silu(temb))
        return projected


class FusedUpsample(nn.Module):
    """Stand-in for an `Upsample2D` with an int8 convolution: repeats codes, not floats."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv: Int8Layer = block.conv

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it is one that interpolates and then convolves."""
        return (
            isinstance(block, Upsample2D)
            and block.interpolate
            and block.norm is None
            and not block.use_conv_transpose
            and isinstance(getattr(block, "conv", None), Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', 2H, 2W)`, or to `output_size`."""
        size: dict[str, Any] = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        codes = self.conv.quantized(self.conv.split(hidden_states))
        height, width = hidden_states.shape[2:]
        if not native.obstacle() and (output_size is None or tuple(output_size) == (2 * height, 2 * width)):
            repeated = [native.upsample(part) for part in codes]
        else:
            repeated = [functional.interpolate(part, mode="nearest", **size) for part in codes]
        return self.conv.product(repeated, self.conv.bias)


class FusedDownsample(nn.Module):
    """Stand-in for a `Downsample2D` with an int8 convolution after asymmetric padding, which that does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv: Int8Layer = block.conv

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it is one that pads by itself, on the right and below."""
        return (
            isinstance(block, Downsample2D)
            and block.use_conv
            and block.padding == 0
            and block.norm is None
            and isinstance(block.conv, Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H // 2, W // 2)`."""
        codes = self.conv.quantized(self.conv.split(hidden_states))
        return self.conv.product(codes, self.conv.bias, below=1)


class FusedOutput(nn.Module):
    """Stand-in for `conv_norm_out` that does the work of `conv_act` and `conv_out` too; these pass it on."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.norm, self.conv = unet.conv_norm_out, unet.conv_out

    @staticmethod
    def is_fusible(unet: Any) -> bool:
        """Return whether the network ends so, with an int8 convolution."""
        return (
            isinstance(getattr(unet, "conv_norm_out", None), nn.GroupNorm)
            and isinstance(getattr(unet, "conv_act", None), nn.SiLU)
            and isinstance(inner(getattr(unet, "conv_out", None)), Int8Layer)
        )

    @classmethod
    def into(cls, unet: Any) -> None:
        """Put one into the network, in place."""
        unet.conv_norm_out, unet.conv_act, unet.conv_out = cls(unet), nn.Identity(), PassedOn(unet.conv_out)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H, W)`."""
        codes, _ = normed_codes(x, self.norm, inner(self.conv), silu=True)
        return product(self.conv, codes)


class PassedOn(nn.Module):
    """Stand-in for the last convolution, which has been computed already."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x


def inner(layer: Any) -> Any:
    """Return the layer inside a `CorrectedOutput`, or the layer itself where there is none."""
    return layer.layer if isinstance(layer, CorrectedOutput) else layer


def _is_corrected(layer: nn.Module) -> bool:
    return isinstance(layer, CorrectedOutput) and layer.acts


def product(layer: Any, codes: Sequence[Tensor], added: Tensor | None = None) -> Tensor:
    """Return the layer's output for the codes of its parts, plus `added`; the caller may change it in place.

    In cached calls it is corrected first, if the layer has such a correction.
    """
    quantized: Int8Layer = inner(layer)
    if not _is_corrected(layer):
        return quantized.product(codes, quantized.bias, added)
    output = quantized.product(codes, quantized.bias)
    if not native.obstacle():
        step = layer.context.declared_step
        return native.adjust(output, layer.shift, gain=layer.gain, added=added, step=step)
    output = layer.corrected(output)
    return output if added is None else output.add_(added)
