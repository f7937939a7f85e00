"""A denoiser whose predictions go through an output map."""

from __future__ import annotations

from torch import Tensor

from errata.runtime.denoiser import Conditioning, Denoiser, WrappedDenoiser
from errata.runtime.output_map import OutputMap


class MappedDenoiser(WrappedDenoiser):
    """A `Denoiser` whose predictions go through an output map; features and costs are those inside."""

    def __init__(self, denoiser: Denoiser, output_map: OutputMap) -> None:
        super().__init__(denoiser)
        self._map = output_map

    @property
    def reuses_outputs(self) -> bool:
        """Whether features, and predictions that are not mapped, are overwritten by the next call."""
        return getattr(self.denoiser, "reuses_outputs", False)

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        prediction, feature = super().full(x, step, cond)
        return self._map(prediction, step, "full"), feature

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`."""
        prediction = super().cached(x, step, cond, feature, is_extrapolated=is_extrapolated)
        return self._map(prediction, step, "cached")
