"""A measured value with what its uncertainty follows from, so that two of the same seeds compare in pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from errata.quality.intervals import CONFIDENCE, Estimate, centred_interval, mean_estimate


@dataclass(frozen=True)
class Measured:
    """A value of one set of samples; exactly one of `parts` and `replicates` is there.

    Attributes:
        value: what was measured.
        parts: `(N,)`, float64; one for each sample. Their mean is the value, or differs from it by a constant
            that all sets share.
        replicates: `(R,)`, float64; the value of the r-th resampled set. Resampling r takes the same samples
            of every set.
    """

    value: float
    parts: Tensor | None = None
    replicates: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.parts is None) == (self.replicates is None):
            raise ValueError("a measured value needs either parts or replicates")

    @classmethod
    def mean(cls, parts: Tensor) -> Measured:
        """The mean of one number for each sample, `(N,)`."""
        parts = parts.double()
        return cls(float(parts.mean()), parts=parts)

    def estimate(self, *, confidence: float = CONFIDENCE) -> Estimate:
        """The value with its interval."""
        return _estimate(self.value, self.parts, self.replicates, confidence)

    def minus(self, other: Measured, *, confidence: float = CONFIDENCE) -> Estimate:
        """Its value minus the other's, with the interval of the paired difference.

        Raises:
            ValueError: they are of different kinds or sizes, so nothing pairs.
        """
        difference = self.value - other.value
        for mine, theirs, is_parts in (
            (self.parts, other.parts, True),
            (self.replicates, other.replicates, False),
        ):
            if mine is None or theirs is None:
                continue
            if mine.shape != theirs.shape:
                raise ValueError(f"{len(mine)} and {len(theirs)} numbers do not pair")
            apart = mine - theirs
            return _estimate(difference, apart if is_parts else None, None if is_parts else apart, confidence)
        raise ValueError("a value with parts and one with replicates do not pair")


def _estimate(value: float, parts: Tensor | None, replicates: Tensor | None, confidence: float) -> Estimate:
    if replicates is not None:
        return Estimate(value, centred_interval(replicates, value, confidence=confidence))
    assert parts is not None  # one of the two is there
    spread = mean_estimate(parts, confidence=confidence)
    shift = value - spread.value
    return Estimate(value, spread.interval.moved(shift))
