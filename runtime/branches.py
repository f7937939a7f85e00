"""The two halves of a feature cache: a full pass that keeps the feature, and a network that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def kept_input(resnet: nn.Module, *, channels: int) -> Iterator[list[Tensor]]:
    """Yield a list that gets the first `channels` channels of what `resnet` reads in the body.

    They are copied, `(B, channels, H, W)`, so the concatenation that they come from is freed. The copy has
    the memory format of that concatenation: with it, a cached call joins it with the skip input in the same
    format, and repeats the full call bit for bit.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x: Tensor = arguments[0]
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        kept.append(x[:, :channels].clone(memory_format=memory_format))

    handle = resnet.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def shallow_view(unet: Any, feature: Tensor, *, branch: int) -> Any:
    """Return a UNet that computes the last `branch` resnets of the up path from `feature`.

    It is of the same class as `unet`, so embeddings, conditioning, masks and sizes are handled by the same
    forward. It shares every module that it keeps with `unet`, and has less of the rest: down blocks up to the
    last skip input that is read, a mid block that answers `feature`, up blocks from the cut on. It takes
    microseconds to make, so one is made for each call: there is none that could outlive a replaced layer.

    `unet` must be cacheable and `branch` allowed (`structure.cut_at`); `feature` is `(B, C, H, W)`.
    """
    unet = uncompiled(unet)
    down, up = _down_blocks(unet, branch - 1), _up_blocks(unet, branch)
    changes = {
        "down_blocks": _shell(unet.down_blocks, _numbered(down)),
        "mid_block": _StoredFeature(feature),
        "up_blocks": _shell(unet.up_blocks, _numbered(up)),
    }
    return _shell(unet, {**unet._modules, **changes})


class _StoredFeature(nn.Module):
    """Stand-in for everything before the cut: it returns the stored feature for any input."""

    def __init__(self, feature: Tensor) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the stored feature."""
        return self.feature


def uncompiled(module: Any) -> Any:
    """Return the module itself; of what `torch.compile(module)` returns, the one that was compiled."""
    return getattr(module, "_orig_mod", module)


def _down_blocks(unet: Any, outputs: int) -> list[Any]:
    """Return the down blocks that leave that many skip inputs, besides the output of `conv_in`."""
    kept: list[Any] = []
    for block in unet.down_blocks:
        if outputs <= 0:
            break
        depth = len(block.resnets)
        whole = depth + (block.downsamplers is not None)
        kept.append(block if outputs >= whole else _slice(block, 0, outputs, {"downsamplers": None}))
        outputs -= whole
    return kept


def _up_blocks(unet: Any, branch: int) -> list[Any]:
    """Return the up blocks with the last `branch` resnets."""
    kept: list[Any] = []
    for block in reversed(unet.up_blocks):
        if branch <= 0:
            break
        depth = len(block.resnets)
        kept.append(block if branch >= depth else _slice(block, depth - branch, depth, {}))
        branch -= depth
    return kept[::-1]


def _slice(block: Any, start: int, end: int, changes: Mapping[str, nn.Module | None]) -> Any:
    """Return the block with its resnets `start` to `end`, and the attentions that follow them."""
    block = uncompiled(block)
    resnets = list(block.resnets)
    parts = {**block._modules, **changes, "resnets": _shell(block.resnets, _numbered(resnets[start:end]))}
    if (attentions := block._modules.get("attentions")) is not None:
        each = len(attentions) // len(resnets)  # several in AudioLDM2
        kept = list(attentions)[start * each : end * each]
        parts["attentions"] = _shell(attentions, _numbered(kept))
    return _shell(block, parts)


def _numbered(modules: list[Any]) -> dict[str, Any]:
    return {str(index): module for index, module in enumerate(modules)}


def _shell(module: nn.Module, modules: Mapping[str, nn.Module | None]) -> Any:
    """Return a module of the same class, attributes and parameters, with other submodules; not compiled."""
    module = uncompiled(module)
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    # A submodule that was None is a plain attribute, which would hide the new one; offloading hooks of
    # accelerate leave a forward there that is bound to the original, and `module.compile()` a call.
    for name in ("forward", "_compiled_call_impl", *modules):
        shell.__dict__.pop(name, None)
    shell.__dict__["_modules"] = dict(modules)
    return shell
