"""The maps that were fitted to a run, and the maps of the calls of another run.

Every denoiser call of a run has a noise level. Evaluations that the fit never made, such as the full
evaluation of a step that was cached there, take their numbers from the fitted calls of the same kind and the
same stream (see `errata.runtime.schedule`) whose levels are nearest: interpolated linearly between the two
around them, and those of the outermost one beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.correct.noise_levels import NoiseLevels
from errata.runtime.denoiser import Conditioning, Denoiser, WrappedDenoiser
from errata.runtime.output_map import CallMaps, OutputMap
from errata.runtime.schedule import CacheSchedule, StepKind

KINDS: tuple[StepKind, ...] = ("full", "cached")
# The level of a call whose sample is nothing but noise; any real one is far below.
_PURE_NOISE = 20.0


@dataclass(frozen=True, kw_only=True)
class CallLevels:
    """The calls of a run, by how noisy their samples are.

    Attributes:
        values: of every call: log(noise / signal), or the training timestep where that is not known.
        are_known: which of the two.
        calls_per_step: calls of one sampler step; each belongs to a stream of its own.
    """

    values: tuple[float, ...]
    are_known: bool
    calls_per_step: int = 1

    @classmethod
    def of(
        cls, levels: NoiseLevels | None, timesteps: tuple[float, ...], schedule: CacheSchedule
    ) -> CallLevels:
        """Return the levels of a run's calls; `levels` are None where they are not known."""
        if levels is None:
            return cls(values=timesteps, are_known=False, calls_per_step=schedule.calls_per_step)
        pairs = zip(levels.noise, levels.signal, strict=True)
        values = tuple(math.log(b / a) if a > 0 else _PURE_NOISE for b, a in pairs)
        return cls(values=values, are_known=True, calls_per_step=schedule.calls_per_step)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedMaps:
    """The maps of the calls that a fit has seen, a row each; rows are sorted by kind, then by call.

    Attributes:
        call: index of the denoiser call, `(R,)`, int64.
        kind: 0 for a full evaluation, 1 for a cached one, `(R,)`, uint8.
        matrix: `(R, C, C)`, float32.
        bias: `(R, C)`, float32, in the unit of the prediction.
    """

    call: Tensor
    kind: Tensor
    matrix: Tensor
    bias: Tensor

    @classmethod
    def of(cls, maps: CallMaps, calls: Mapping[StepKind, Sequence[int]]) -> FittedMaps:
        """Return the maps of some calls, by kind of the evaluations that they are for."""
        rows = [(kind, call) for kind in KINDS for call in calls.get(kind, ())]
        chosen = [call for _, call in rows]
        return cls(
            call=torch.tensor(chosen),
            kind=torch.tensor([KINDS.index(kind) for kind, _ in rows], dtype=torch.uint8),
            matrix=maps.matrix[chosen],
            bias=maps.bias[chosen],
        )

    @property
    def channels(self) -> int:
        """Channels of the prediction, C."""
        return self.bias.shape[1]

    def output_map(
        self, fitted: CallLevels, wanted: CallLevels, *, steps: Sequence[int], has_cache: bool
    ) -> OutputMap:
        """Return the map for a run: this one's own numbers where the levels are the same, else interpolated.

        Args:
            fitted: levels of the calls of the fit.
            wanted: those of the run.
            steps: calls of the run that are mapped; others stay as they are.
            has_cache: whether the run has cached calls.
        """
        kinds = KINDS if has_cache else KINDS[:1]
        full, *cached = (self._calls(kind, fitted, wanted, steps) for kind in kinds)
        return OutputMap(full=full, cached=cached[0] if cached else None)

    def _calls(
        self, kind: StepKind, fitted: CallLevels, wanted: CallLevels, steps: Sequence[int]
    ) -> CallMaps:
        maps = CallMaps.identity(len(wanted.values), self.channels)
        of_kind = (self.kind == KINDS.index(kind)).nonzero().flatten().tolist()
        for step in steps:
            stream = step % wanted.calls_per_step
            rows = [row for row in of_kind if int(self.call[row]) % fitted.calls_per_step == stream]
            if not rows:
                continue
            shares = self._shares(rows, step, fitted, wanted)
            chosen, weights = list(shares), torch.tensor(list(shares.values()))
            maps.matrix[step] = torch.einsum("r,rij->ij", weights, self.matrix[chosen])
            maps.bias[step] = weights @ self.bias[chosen]
        return maps

    def _shares(self, rows: list[int], step: int, fitted: CallLevels, wanted: CallLevels) -> dict[int, float]:
        """Return the rows that make up the map of a call, with their weights."""
        if fitted.values == wanted.values:
            for row in rows:
                if int(self.call[row]) == step:
                    return {row: 1.0}
        level = wanted.values[step]
        by_level = sorted(rows, key=lambda row: fitted.values[int(self.call[row])])
        levels = [fitted.values[int(self.call[row])] for row in by_level]
        above = next((place for place, value in enumerate(levels) if value >= level), None)
        if above is None or above == 0:
            return {by_level[-1 if above is None else 0]: 1.0}
        low, high = levels[above - 1], levels[above]
        part = (level - low) / (high - low)
        return {by_level[above - 1]: 1 - part, by_level[above]: part}


class MappedDenoiser(WrappedDenoiser):
    """A `Denoiser` whose predictions go through an output map; features and costs are those inside."""

    def __init__(self, denoiser: Denoiser, output_map: OutputMap) -> None:
        super().__init__(denoiser)
        self._map = output_map

    @property
    def reuses_outputs(self) -> bool:
        """Whether features, and predictions that are not mapped, are overwritten by the next call."""
        return getattr(self.denoiser, "reuses_outputs", False)

    def corrected(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Conditioning
    ) -> Tensor:
        """Return the mapped prediction."""
        return self._map(prediction, step, kind)
