"""What no recipe can serve, refused before anything is touched."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from errata.errors import RecipeError

_UNETS = ("UNet2DModel", "UNet2DConditionModel", "AudioLDM2UNet2DConditionModel")
# They compute the same attention by different kernels, so another processor may take their place.
_PLAIN_PROCESSORS = frozenset(
    {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SlicedAttnProcessor", "XFormersAttnProcessor"}
)
_FREEU = ("b1", "b2", "s1", "s2")


def check_supported(unet: Any) -> None:
    """Refuses a network that can be neither quantized nor cached.

    Raises:
        RecipeError: naming the class, layer or adapter at fault.
    """
    classes = {cls.__name__ for cls in type(unet).__mro__ if cls.__module__.startswith("diffusers.")}
    if classes.isdisjoint(_UNETS):
        raise RecipeError(f"the denoiser is a {type(unet).__name__}; supported are {', '.join(_UNETS)}")
    check_no_lora(unet)
    if getattr(unet, "position_net", None) is not None:
        raise RecipeError("the UNet has a GLIGEN position net, which is not supported; use one without")
    if any(getattr(block, name, None) is not None for block in unet.up_blocks for name in _FREEU):
        raise RecipeError("FreeU is enabled, which is not supported; call pipe.disable_freeu() first")
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            _check_attention(name, module)


def check_no_lora(unet: nn.Module) -> None:
    """Refuses a UNet whose low-rank adapters are not part of its weights yet.

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
            f"attention {name!r} has fused projections besides its own; load the pipeline anew, and leave "
            "out pipe.fuse_qkv_projections()"
        )
    processor = type(attention.processor)
    is_ours = processor.__module__.startswith("errata.")
    if not is_ours and processor.__name__ not in _PLAIN_PROCESSORS:
        raise RecipeError(
            f"attention {name!r} has the processor {processor.__name__}; supported are "
            f"{', '.join(sorted(_PLAIN_PROCESSORS))}; unload adapters (pipe.unload_ip_adapter()), or call "
            "pipe.unet.set_default_attn_processor()"
        )
