"""A network whose calls are functions of named tensors: what recording and replaying calls builds on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from errata.runtime.unet import BranchedUNet, times_of

Inputs = dict[str, Tensor]
Answer = tuple[Tensor | None, ...]
Signature = tuple[Any, ...]
_CONDITION = "cond."


class ReplayedUNet(BranchedUNet):
    """A `BranchedUNet` that hands each call to `replayed`, as a function of its tensors.

    The inputs are `x`, `timestep`, `(B,)`, and for a cached call `feature`, then the conditions, their names
    after `cond.`.
    """

    def full(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], *, branch: int
    ) -> tuple[Tensor, Tensor | None]:
        """See `BranchedUNet.full`."""
        plain = super().full

        def call(given: Inputs) -> Answer:
            return plain(given["x"], given["timestep"], _conditions_in(given), branch=branch)

        inputs = {"x": x, "timestep": self.times(x, timestep), **_named(cond)}
        prediction, feature = self.replayed(("full", branch), inputs, call)
        assert prediction is not None
        return prediction, feature

    def cached(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], feature: Tensor, *, branch: int
    ) -> Tensor:
        """See `BranchedUNet.cached`."""
        plain = super().cached

        def call(given: Inputs) -> Answer:
            cond, kept = _conditions_in(given), given["feature"]
            return (plain(given["x"], given["timestep"], cond, kept, branch=branch),)

        inputs = {"x": x, "timestep": self.times(x, timestep), "feature": feature, **_named(cond)}
        (prediction,) = self.replayed(("cached", branch), inputs, call)
        assert prediction is not None
        return prediction

    def times(self, x: Tensor, timestep: float | Tensor) -> Tensor:
        """Return the time of each row, `(B,)`, as the network gets it."""
        return times_of(x, timestep)

    @abstractmethod
    def replayed(self, kind: tuple[str, int], inputs: Inputs, call: Callable[[Inputs], Answer]) -> Answer:
        """Return what `call` returns for the inputs; `kind` is that of the call, and its branch."""


def signature_of(kind: tuple[str, int], inputs: Inputs) -> Signature:
    """Return what a recording depends on: kind of call, shapes, memory formats and types."""
    return (*kind, *((name, tuple(x.shape), x.stride(), x.dtype) for name, x in inputs.items()))


def _named(cond: Mapping[str, Tensor]) -> Inputs:
    return {f"{_CONDITION}{name}": value for name, value in cond.items()}


def _conditions_in(given: Inputs) -> Inputs:
    start = len(_CONDITION)
    return {name[start:]: value for name, value in given.items() if name.startswith(_CONDITION)}
