"""Outlines: what a network is made of, as names, kinds and shapes, without torch.

An `Outline` is walked as a torch module is (`named_modules`, `get_submodule`, `state_dict`), and has its
attributes. So whoever derives a scheme from a network derives the same one from its outline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["conv2d", "linear", "attention", "adaptive_norm"]
_KINDS: Mapping[str, Kind] = {
    "Conv2d": "conv2d",
    "Linear": "linear",
    "Attention": "attention",
    "AdaGroupNorm": "adaptive_norm",
}
# Their classes of these names, and those below.
_LIBRARIES = ("torch.nn.", "diffusers.models.", __name__)


def kind_of(module: Any) -> Kind | None:
    """Return what a module of a network or of an outline is, as far as quantization cares."""
    for base in type(module).__mro__:
        if base.__name__ in _KINDS and base.__module__.startswith(_LIBRARIES):
            return _KINDS[base.__name__]
    return None


@dataclass(frozen=True)
class Shape:
    """Shape and type of a parameter that is not there."""

    shape: tuple[int, ...]
    dtype: str = "torch.float32"

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class Outline:
    """A module: its parameters' shapes, and its submodules in the order in which torch registers them."""

    def __init__(self, parameters: Mapping[str, Shape] | None = None, /, **modules: Outline | None) -> None:
        self._parameters = dict(parameters or {})
        self._modules = modules  # None where there might be one

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before __init__, as in a copy
            raise AttributeError(name)
        for found in (self._parameters, self._modules):
            if name in found:
                return found[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Outline]]:
        """Yield this module and all below it with their names, as torch does."""
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Outline]:
        """Yield this module and all below it."""
        return (module for _, module in self.named_modules())

    def get_submodule(self, name: str) -> Outline:
        """Return the module of that name.

        Raises:
            AttributeError: there is none.
        """
        module = self
        for part in name.split("."):
            inner = module._modules.get(part)
            if inner is None:
                raise AttributeError(f"there is no module {name!r}")
            module = inner
        return module

    def state_dict(self) -> dict[str, Shape]:
        """Return the shapes of all parameters by name, in torch's order."""
        return {
            f"{name}.{parameter}" if name else parameter: shape
            for name, module in self.named_modules()
            for parameter, shape in module._parameters.items()
        }


class ModuleList(Outline):
    """A list of modules."""

    def __init__(self, *modules: Outline) -> None:
        super().__init__(**{str(index): module for index, module in enumerate(modules)})

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Outline]:
        return (module for module in self._modules.values() if module is not None)


class Conv2d(Outline):
    """A dense convolution with a bias."""

    groups, padding_mode = 1, "zeros"

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        shapes = {"weight": Shape((out_channels, in_channels, size, size)), "bias": Shape((out_channels,))}
        super().__init__(shapes)
        self.in_channels, self.out_channels = in_channels, out_channels


class Linear(Outline):
    """A linear layer with a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        shapes = {"weight": Shape((out_features, in_features)), "bias": Shape((out_features,))}
        super().__init__(shapes)
        self.in_features, self.out_features = in_features, out_features


class GroupNorm(Outline):
    """A normalization with a scale and a shift for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__({"weight": Shape((channels,)), "bias": Shape((channels,))})


class Attention(Outline):
    """Self-attention with projections of one width."""

    def __init__(self, width: int) -> None:
        super().__init__(
            group_norm=GroupNorm(width),
            to_q=Linear(width, width),
            to_k=Linear(width, width),
            to_v=Linear(width, width),
            to_out=ModuleList(Linear(width, width), Outline()),
        )
