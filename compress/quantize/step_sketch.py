"""What is kept of every quantizer's inputs at one step: extremes, and values or a histogram of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd

import torch
from torch import Tensor

from errata.compress.quantize.histogram import histogram
from errata.compress.quantize.quantizers import choose_range
from errata.compress.quantize.range_search import choose_range_by_histogram

# A site of which a range sees no more values than these is kept exactly. The error of a range is a mean over
# them; twice as many change few ranges. Memory grows with layers, never with samples.
VALUES_PER_STEP = 16384
# A value is cheap in a histogram, so that has more.
_TIMES_IN_HISTOGRAM = 4


@dataclass
class SiteSketch:
    """One site: the extremes of all its values, and either all values or the counts of some.

    Attributes:
        low: the least value, a scalar, float32.
        high: the largest one.
        values: all of them, in parts; empty where there is a histogram.
        counts: `(BINS,)`, int32; None where the values are kept.
    """

    low: Tensor
    high: Tensor
    values: list[Tensor]
    counts: Tensor | None

    def add(self, other: SiteSketch) -> None:
        """Take in what another sketch of the same site holds."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.values = self.values + other.values
        found = [counts for counts in (self.counts, other.counts) if counts is not None]
        if found:  # values too, where batches differ in the length of their texts
            found += [histogram(part).int() for part in self.values]
            self.counts = torch.stack(found).sum(dim=0, dtype=torch.int32)
            self.values = []

    def choose_range(self, *, bits: int, from_zero: bool) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point that fit best; see `choose_range`."""
        if self.counts is None:
            values = torch.cat([*self.values, torch.stack([self.low, self.high])])
            return choose_range(values, bits=bits, from_zero=from_zero)
        return choose_range_by_histogram(self.counts, self.low, self.high, bits=bits, from_zero=from_zero)


class StepSketch:
    """Sketches of all sites at one step; what it holds is on the CPU, and does not grow with the samples.

    Args:
        samples: how many samples a range sees, of this step or of several; each adds its share of the values.
    """

    def __init__(self, *, samples: int) -> None:
        self._samples = samples
        self._part = 1.0
        self._sites: dict[str, SiteSketch] = {}

    def expect(self, samples: int) -> None:
        """Set how many samples the next batch has."""
        self._part = samples / self._samples

    def add(self, name: str, x: Tensor, *, part: float = 1.0) -> None:
        """Take in what a site sees of a batch.

        Args:
            name: of the site.
            x: any shape and floating-point type.
            part: how much of the batch's values it is, where they come in several pieces.
        """
        if x.numel() == 0:
            return
        flat = in_memory_order(x.detach())
        low, high = (value.float().cpu() for value in torch.aminmax(flat))
        part *= self._part
        sketch = SiteSketch(low, high, [], None)
        # A millionth less: parts of thirds do not add up to one.
        if flat.numel() * (1 - 1e-6) <= VALUES_PER_STEP * part:
            sketch.values.append(flat.flatten().float().cpu())
        else:
            count = min(ceil(_TIMES_IN_HISTOGRAM * VALUES_PER_STEP * part), flat.numel())
            sketch.counts = histogram(spread_values(flat, count)).int().cpu()
        self._merge(name, sketch)

    def merge(self, other: StepSketch) -> None:
        """Take in another step's sketches."""
        for name, sketch in other._sites.items():
            self._merge(name, sketch)

    def _merge(self, name: str, sketch: SiteSketch) -> None:
        if name in self._sites:
            self._sites[name].add(sketch)
        else:
            self._sites[name] = SiteSketch(sketch.low, sketch.high, sketch.values, sketch.counts)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that were seen, in the order in which the network ran them."""
        return tuple(self._sites)

    def choose_range(self, name: str, *, bits: int, from_zero: bool = False) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point that fit a site best, scalars.

        Raises:
            ValueError: the layer did not run, or what it reads is not finite.
        """
        if name not in self._sites:
            return choose_range(torch.empty(0), bits=bits, from_zero=from_zero)
        return self._sites[name].choose_range(bits=bits, from_zero=from_zero)

    @classmethod
    def together(cls, sketches: Iterable[StepSketch]) -> StepSketch:
        """Return what several steps saw together."""
        result = cls(samples=1)
        for sketch in sketches:
            result.merge(sketch)
        return result


def in_memory_order(x: Tensor) -> Tensor:
    """Return a view with the dimensions as they lie in memory, which is the fastest order to read them in."""
    strides = x.stride()
    return x.permute(sorted(range(x.ndim), key=lambda dim: -strides[dim]))


def spread_values(x: Tensor, count: int) -> Tensor:
    """Return `count` values, evenly spread over a tensor, `(count,)`; the choice is deterministic."""
    places = _places(tuple(x.shape), tuple(x.stride()), count).to(x.device)
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((span,), (1,), x.storage_offset()).index_select(0, places)


def spread_places(total: int, count: int) -> Tensor:
    """Return `count` different places below `total`, spread evenly over every dimension, `(count,)`.

    Multiples of the golden section leave no large gap, however many there are; without a factor in common
    with `total`, they leave out no channel either.
    """
    distance = max(1, round(total * (5**0.5 - 1) / 2))
    while gcd(distance, total) > 1:
        distance += 1
    return torch.arange(count).mul_(distance).remainder_(total)


@lru_cache(maxsize=64)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], count: int) -> Tensor:
    """Return offsets in memory, ascending, `(count,)`."""
    index = spread_places(torch.Size(shape).numel(), count)
    offsets = torch.zeros_like(index)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        offsets += index.remainder(size) * stride
        index = index.div(size, rounding_mode="floor")
    return offsets.sort().values
