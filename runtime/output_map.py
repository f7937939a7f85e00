"""The output map: an affine correction of what the network returns, with numbers of its own for each call.

    symbol   here         meaning
    ε̃        prediction   what the network returned, (B, C, H, W): noise, velocity or x_0
    M_i      matrix[i]    of call i, (C, C)
    b_i      bias[i]      of call i, (C,)

    ε̂ = M_i ε̃ + b_i, at every pixel and in every row of the batch alike

A call may have one pair of numbers for a full evaluation and another one for a cached evaluation. A call
whose map is the identity returns the prediction itself.

Source: this project. Relatives with one factor per channel: PTQD (He et al., NeurIPS 2023), D²-DPM (Zeng et
al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.runtime.paired_change import output_map_text as output_map_text
from errata.runtime.schedule import StepKind
from errata.runtime.scheme import OUTPUT_MAP as OUTPUT_MAP
from errata.runtime.scheme import Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class CallMaps:
    """The maps of all calls of a run, for evaluations of one kind.

    Attributes:
        matrix: `(T, C, C)`, float32.
        bias: `(T, C)`, float32, in the unit of the prediction.

    Raises:
        ValueError: the shapes do not belong together, or a number is not finite.
    """

    matrix: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        calls, channels = self.bias.shape if self.bias.ndim == 2 else (0, 0)
        if self.matrix.shape != (calls, channels, channels) or not calls:
            raise ValueError(
                f"matrix {tuple(self.matrix.shape)} and bias {tuple(self.bias.shape)} do not belong "
                "together; they must be (T, C, C) and (T, C)"
            )
        if not bool(self.matrix.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("a number of the output map is not finite")

    @classmethod
    def identity(cls, calls: int, channels: int) -> CallMaps:
        """Return maps that change nothing."""
        return cls(matrix=torch.eye(channels).repeat(calls, 1, 1), bias=torch.zeros(calls, channels))

    @property
    def is_identity(self) -> tuple[bool, ...]:
        """Of each call, whether its map changes nothing."""
        same = (self.matrix == torch.eye(self.matrix.shape[1])).flatten(1).all(1) & (self.bias == 0).all(1)
        return tuple(same.tolist())


class OutputMap:
    """Maps predictions; made once, used at every call, also by several threads.

    Args:
        full: for full evaluations.
        cached: for cached ones; None where there are none.
    """

    def __init__(self, *, full: CallMaps, cached: CallMaps | None = None) -> None:
        self._maps: dict[StepKind, CallMaps] = {"full": full}
        if cached is not None:
            self._maps["cached"] = cached
        self._idle = {kind: maps.is_identity for kind, maps in self._maps.items()}
        # For each kind and device, the numbers of each call.
        self._ready: dict[tuple[StepKind, torch.device], list[tuple[Tensor, Tensor]]] = {}

    @classmethod
    def of(cls, scheme: Scheme, table: Mapping[str, Tensor]) -> OutputMap | None:
        """Return the map that a scheme asks for, with numbers of its table; None without one."""
        if scheme.output is None:
            return None
        matrix, bias = (table[name] for name in OUTPUT_MAP)
        maps = CallMaps(matrix=matrix, bias=bias)
        return cls(full=maps, cached=maps)

    def __call__(self, prediction: Tensor, step: int, kind: StepKind) -> Tensor:
        """Return the corrected prediction, `(B, C, H, W)`, in its own type; computed in float32 or wider."""
        if self._idle[kind][step]:
            return prediction
        matrix, bias = self._on(prediction.device, kind)[step]
        return mapped(prediction, matrix, bias)

    def _on(self, device: torch.device, kind: StepKind) -> list[tuple[Tensor, Tensor]]:
        """Return matrix and bias of every call, sent to the device once."""
        if (kind, device) not in self._ready:
            maps = self._maps[kind]
            matrices, biases = maps.matrix.to(device).unbind(), maps.bias.to(device).unbind()
            self._ready[kind, device] = list(zip(matrices, biases, strict=True))
        return self._ready[kind, device]


def mapped(prediction: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Return M ε̃ + b for a prediction `(B, C, H, W)`, in its own type; computed in float32 or wider."""
    wide = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).flatten(2)
    rows = matrix.to(wide.dtype).expand(len(wide), -1, -1)
    return torch.baddbmm(bias.to(wide.dtype)[:, None], rows, wide).view_as(prediction).to(prediction.dtype)
