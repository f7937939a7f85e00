"""How diffusers' UNets are put together, which of them are supported, and which can be cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.errors import RecipeError
from errata.runtime.outline import Outline, kind_of

if TYPE_CHECKING:
    from torch import nn

    Network = nn.Module | Outline
    """A UNet, or its outline."""

# Blocks whose layers run one after another, each up-block resnet on one skip input, each down-block layer
# (resnet with its attentions, or downsampler) leaving one. A cache may cut between any two of them.
_CACHEABLE = frozenset(
    {"AttnDownBlock2D", "AttnUpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D"}
    | {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"}
)
_EMBEDDINGS = ("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj")
# DeepCache's settings (Ma et al., CVPR 2024): the last 3 resnets in pixel space, the last 1 in latent space.
_PIXEL_BRANCH, _LATENT_BRANCH = 3, 1
_UNETS = ("UNet2DModel", "UNet2DConditionModel", "AudioLDM2UNet2DConditionModel")
# They compute the same attention by different kernels, so another processor may take their place.
_PLAIN_PROCESSORS = frozenset(
    {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SlicedAttnProcessor", "XFormersAttnProcessor"}
)
_FREEU = ("b1", "b2", "s1", "s2")


@dataclass(frozen=True, kw_only=True)
class UpResnet:
    """One resnet of the up path.

    Attributes:
        name: such as `up_blocks.1.resnets.0`.
        hidden_channels: width of the hidden state that enters it, without the skip input.
        reads_skip: whether it reads that hidden state and a skip input, concatenated.
    """

    name: str
    hidden_channels: int
    reads_skip: bool


def up_resnets(unet: Any) -> tuple[UpResnet, ...]:
    """Return all resnets of the up path, in the order in which they run."""
    hidden = int(unet.config.block_out_channels[-1])
    found = []
    for block_index, block in enumerate(unet.up_blocks):
        for index, resnet in enumerate(block.resnets):
            name = f"up_blocks.{block_index}.resnets.{index}"
            reads_skip = resnet.in_channels > hidden  # K blocks concatenate before their first resnet only
            found.append(UpResnet(name=name, hidden_channels=hidden, reads_skip=reads_skip))
            hidden = _out_channels(resnet)
    return tuple(found)


def output_channels(unet: Any) -> int:
    """Return the channels of a diffusers UNet's prediction."""
    return int(unet.config.out_channels)


def skip_widths(unet: Network) -> dict[str, int]:
    """Return the width of the main half of every concatenated input, by layer name; `unet` is a float one.

    The first convolution (and the 1x1 shortcut) of an up-block resnet reads `[hidden, skip]` concatenated
    over channels; the value is the number of channels of `hidden`.
    """
    widths: dict[str, int] = {}
    for resnet in up_resnets(unet):
        if resnet.reads_skip:
            widths |= dict.fromkeys(_input_layers(unet, resnet.name), resnet.hidden_channels)
    return widths


def feature_channels(unet: Network, branch: int) -> int:
    """Return the width of the feature that a cache keeps, with `branch` resnets recomputed in cached steps.

    Raises:
        RecipeError: this UNet cannot be cached, or not there.
    """
    return cut_at(unet, branch).hidden_channels


def feature_readers(unet: Network, branch: int) -> tuple[str, ...]:
    """Return the names of the layers that read that feature: a `conv1` and, if any, its `conv_shortcut`.

    Raises:
        RecipeError: this UNet cannot be cached, or not there.
    """
    return _input_layers(unet, cut_at(unet, branch).name)


def default_branch(unet: Network) -> int:
    """Return how many resnets the papers recompute: 3 for an unconditional pixel-space network, else 1.

    Raises:
        RecipeError: this UNet cannot be cached.
    """
    check_cacheable(unet)
    preferred = _PIXEL_BRANCH if type(unet).__name__ == "UNet2DModel" else _LATENT_BRANCH
    return min(preferred, len(up_resnets(unet)))


def embedding_layers(unet: Network) -> frozenset[str]:
    """Return the names of the layers that work on the embedding of time, class and conditions.

    They read one vector (or one per token) a sample and see every step; recipes keep 8-bit weights and float
    activations there. Among them are the projections in every resnet and in every adaptive group norm.
    """
    modules = list(unet.named_modules())
    adaptive = {f"{name}.linear" for name, module in modules if kind_of(module) == "adaptive_norm"}
    return frozenset(
        name
        for name, module in modules
        if kind_of(module) in ("conv2d", "linear")
        and (name.split(".")[0] in _EMBEDDINGS or name.endswith(".time_emb_proj") or name in adaptive)
    )


def cut_at(unet: Network, branch: int) -> UpResnet:
    """Return the first of the last `branch` resnets of the up path.

    Raises:
        RecipeError: this UNet cannot be cached, or has fewer resnets there.
    """
    check_cacheable(unet)
    resnets = up_resnets(unet)
    if not 1 <= branch <= len(resnets):
        raise RecipeError(
            f"branch={branch}, but the up blocks have {len(resnets)} resnets; allowed are 1 to {len(resnets)}"
        )
    return resnets[-branch]


def is_cacheable(unet: Network) -> bool:
    """Return whether features of this UNet can be cached."""
    return not _obstacle(unet)


def largest_branch(unet: Network) -> int:
    """Return how many resnets the up path has, the largest branch; 0 where features cannot be cached."""
    return len(up_resnets(unet)) if is_cacheable(unet) else 0


def check_cacheable(unet: Network) -> None:
    """Check that the features of a UNet can be cached.

    Raises:
        RecipeError: naming the block.
    """
    if obstacle := _obstacle(unet):
        raise RecipeError(
            f"this {type(unet).__name__} cannot use a feature cache: {obstacle}; "
            "choose a recipe without a cache"
        )


def _obstacle(unet: Any) -> str:
    for kind, blocks in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        for index, block in enumerate(blocks):
            if type(block).__name__ not in _CACHEABLE:
                allowed = ", ".join(sorted(_CACHEABLE))
                return f"{kind}_blocks.{index} is a {type(block).__name__}, supported are {allowed}"
    outputs = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in unet.down_blocks)
    if outputs != len(up_resnets(unet)):
        return f"its down blocks make {outputs} skip inputs for {len(up_resnets(unet))} up-block resnets"
    return ""


def _input_layers(unet: Network, resnet: str) -> tuple[str, ...]:
    module = unet.get_submodule(resnet)
    names = (name for name in ("conv1", "conv_shortcut") if getattr(module, name, None) is not None)
    return tuple(f"{resnet}.{name}" for name in names)


def _out_channels(resnet: Any) -> int:
    # The attribute is not the width where a K resnet changes it in its last convolution.
    last = resnet.conv2
    return int(last.out_channels if kind_of(last) == "conv2d" else resnet.out_channels)


def check_supported(unet: Any) -> None:
    """Check that a network can be quantized or cached.

    Raises:
        RecipeError: naming the class, layer or adapter at fault.
    """
    if isinstance(unet, Outline):  # of other networks there is none
        return
    classes = {cls.__name__ for cls in type(unet).__mro__ if cls.__module__.startswith("diffusers.")}
    if classes.isdisjoint(_UNETS):
        raise RecipeError(f"the denoiser is a {type(unet).__name__}; supported are {', '.join(_UNETS)}")
    check_no_lora(unet)
    if getattr(unet, "position_net", None) is not None:
        raise RecipeError("the UNet has a GLIGEN position net, which is not supported; use one without")
    if any(getattr(block, name, None) is not None for block in unet.up_blocks for name in _FREEU):
        raise RecipeError("FreeU is enabled, which is not supported; call pipe.disable_freeu() first")
    for name, module in unet.named_modules():
        if kind_of(module) == "attention":
            _check_attention(name, module)


def check_no_lora(unet: nn.Module) -> None:
    """Check that a UNet has no low-rank adapters beside its weights.

    Raises:
        RecipeError: naming a layer that has one.
    """
    wrapped = next((name for name, module in unet.named_modules() if hasattr(module, "base_layer")), None)
    adapter = next((name for name, _ in unet.named_parameters() if "lora_" in name), None)
    found = wrapped or adapter
    if found is not None:
        raise RecipeError(
            f"the UNet has unfused LoRA weights ({found}); fuse them first: "
            "pipe.fuse_lora(); pipe.unload_lora_weights()"
        )


def _check_attention(name: str, attention: Any) -> None:
    if attention.added_kv_proj_dim is not None:
        raise RecipeError(
            f"attention {name!r} adds projected keys and values "
            f"(added_kv_proj_dim={attention.added_kv_proj_dim}); supported is plain attention"
        )
    if attention.fused_projections:
        raise RecipeError(
            f"attention {name!r} has fused projections besides its own; load the pipeline again without "
            "pipe.fuse_qkv_projections()"
        )
    processor = type(attention.processor)
    is_ours = processor.__module__.startswith("errata.")
    if not is_ours and processor.__name__ not in _PLAIN_PROCESSORS:
        raise RecipeError(
            f"attention {name!r} has the processor {processor.__name__}; supported are "
            f"{', '.join(sorted(_PLAIN_PROCESSORS))}; unload adapters (pipe.unload_ip_adapter()), or call "
            "pipe.unet.set_default_attn_processor()"
        )
