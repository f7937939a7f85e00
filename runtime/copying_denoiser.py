"""Copies of what a denoiser returns, for denoisers that write every result into the same memory."""

from __future__ import annotations

from torch import Tensor

from errata.runtime.denoiser import Conditioning, Denoiser, WrappedDenoiser


def owned(denoiser: Denoiser) -> Denoiser:
    """Return `denoiser`, whose answers are copied if it says that it `reuses_outputs`; see `Denoiser`."""
    return CopyingDenoiser(denoiser) if getattr(denoiser, "reuses_outputs", False) else denoiser


class CopyingDenoiser(WrappedDenoiser):
    """A `Denoiser` that copies the results of another one, which the next call would overwrite.

    A feature that is stored, a prediction in a scheduler's history, the first half of a guidance in two
    calls: all of them are read after later calls. Copying costs nothing beside an evaluation.
    """

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        prediction, feature = super().full(x, step, cond)
        return prediction.clone(), None if feature is None else feature.clone()

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`."""
        return super().cached(x, step, cond, feature, is_extrapolated=is_extrapolated).clone()
