"""Large weights stay as they are stored: copies of a network share them, and layers convert them in a call.

A network of 2.6 billion weights takes 5 GB in half precision and 10 GB in float32, once for every copy. What
a layer needs while it runs is its own weight alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Model = TypeVar("_Model", bound=nn.Module)

# A weight with at least as many values is large: 4 MiB in float32. To convert one takes a few per cent of the
# product's time at least, and in networks that fill the memory nearly all values are in such weights.
LARGE = 2**20


class StoredConv2d(nn.Conv2d):
    """A convolution that computes in the type of its input, in whichever type its weight is stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the type of `x`; shapes as in the layer."""
        return self._conv_forward(x, self.weight.to(x.dtype), _bias(self, x))


class StoredLinear(nn.Linear):
    """A linear layer that computes in the type of its input, in whichever type its weight is stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the type of `x`; shapes as in the layer."""
        return nn.functional.linear(x, self.weight.to(x.dtype), _bias(self, x))


# By the exact type: of a class that is derived from a layer, nobody knows what else its forward does.
_STORED_TYPES: dict[type[nn.Module], Any] = {
    nn.Conv2d: StoredConv2d,
    nn.Linear: StoredLinear,
    StoredConv2d: StoredConv2d,
    StoredLinear: StoredLinear,
}


def _bias(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(x.dtype)


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return, by name, the weights that their layers convert to the type that the network computes in."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, StoredConv2d | StoredLinear)
    }


def computing_type(model: nn.Module) -> torch.dtype:
    """Return the type that a network computes in: that of what its layers do not convert."""
    stored = stored_weights(model)
    types = (value.dtype for name, value in model.named_parameters() if name not in stored)
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)


def in_stored_type(model: nn.Module) -> nn.Module:
    """Return what to save of a network: all of it in the type of its large weights, where that is exact.

    So a network that was opened from half precision is saved as it was opened. Others are returned as they
    are, and so is one whose small parameters have values of float32 by now.
    """
    types = {weight.dtype for weight in stored_weights(model).values()} - {computing_type(model)}
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    if len(types) != 1 or not all(torch.equal(value, value.to(*types).to(value.dtype)) for value in floats):
        return model
    return sharing_copy(model, *types)


@torch.no_grad()
def compute_in_float32_(model: nn.Module) -> None:
    """Make a network in half precision compute in float32, in place, without expanding its large weights.

    Every result is the one of `model.float()`: a half-precision weight is a float32 number, too. What
    `model.dtype` says is float32, because the first parameter is small.
    """
    large = dict(_large_layers(model))
    # By what they were: a parameter of two modules stays one.
    known = {
        id(layer.weight): nn.Parameter(layer.weight.detach(), layer.weight.requires_grad)
        for layer in large.values()
    }
    olds = list(model.parameters())  # while they are held, no new one has the place of one in memory
    for old in olds:
        if old.is_floating_point():
            known.setdefault(id(old), nn.Parameter(old.detach().float(), old.requires_grad))
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = known.get(id(value), value)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    for layer in large.values():
        layer.__class__ = _STORED_TYPES[type(layer)]


def sharing_copy(
    model: _Model,
    dtype: torch.dtype | None,
    *,
    float32_modules: Collection[str] = (),
    channels_last: bool = False,
) -> _Model:
    """Return a copy that computes in `dtype`, in evaluation mode, and shares the large weights of `model`.

    Large weights of convolutions and linear layers are the very memory of `model`; they are converted when
    their layers run, and must not be written to: put another parameter in place of one that is to change.
    Everything else is copied and converted now.

    Args:
        model: the network; left alone.
        dtype: a floating-point type; None leaves every type as it is.
        float32_modules: parts of names; what lies in modules with such a part in their name is in float32.
        channels_last: whether the copied weights of convolutions are.
    """
    shared = {id(layer.weight) for _, layer in _large_layers(model)}
    known: dict[int, object] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        wanted = torch.float32 if any(part in float32_modules for part in name.split(".")) else dtype
        if id(value) in shared:
            converted = value.detach()
        elif value.is_floating_point():
            converted = value.detach().to(wanted or value.dtype, copy=True)
            if channels_last and converted.ndim == 4:
                converted = converted.contiguous(memory_format=torch.channels_last)
        else:
            continue
        is_parameter = isinstance(value, nn.Parameter)
        known[id(value)] = nn.Parameter(converted, requires_grad=False) if is_parameter else converted
    made = copy.deepcopy(model, known).eval()
    for _, layer in _large_layers(made):
        if dtype is not None and layer.weight.dtype != dtype:
            layer.__class__ = _STORED_TYPES[type(layer)]
    return made


def shared_size(model: nn.Module) -> int:
    """Return how many values the weights have that copies of a network share."""
    return sum(layer.weight.numel() for _, layer in _large_layers(model))


@torch.no_grad()
def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a copy of `value` in the place of a parameter, on its device; the old one is left alone."""
    owner, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    new = value.detach().to(old.device, copy=True)
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)


def is_large(weight: Tensor) -> bool:
    """Return whether copies of a network share a weight like this one; codes count like their weight."""
    return weight.numel() >= LARGE


def _large_layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Yield the layers whose weights can stay as they are: large, and read by no module of another type."""
    others = {
        id(value)
        for module in model.modules()
        if type(module) not in _STORED_TYPES
        for value in module._parameters.values()
    }
    for name, module in model.named_modules():
        if type(module) in _STORED_TYPES and is_large(module.weight) and id(module.weight) not in others:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            yield name, module
