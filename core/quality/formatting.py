"""Numbers as text, with no more digits than their uncertainty justifies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from errata.quality.intervals import Estimate


def decimals_for(estimate: Estimate) -> int:
    """Return the decimals that show two significant digits of the interval's half width."""
    half = (estimate.interval.high - estimate.interval.low) / 2
    if not math.isfinite(half) or half <= 0:
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def value(estimate: Estimate, *, decimals: int | None = None) -> str:
    """Return the value alone: `12.3`; `decimals`, if not as many as the interval justifies."""
    shown = decimals_for(estimate) if decimals is None else decimals
    return _minus(f"{estimate.value:.{shown}f}")


def interval(estimate: Estimate, *, decimals: int | None = None) -> str:
    """Return the interval alone: `11.8 to 12.9`; `decimals` as for `value`."""
    shown = decimals_for(estimate) if decimals is None else decimals
    return _minus(f"{estimate.interval.low:.{shown}f} to {estimate.interval.high:.{shown}f}")


def signed(estimate: Estimate) -> str:
    """Return a difference with its sign: `+1.2`, `−0.35`."""
    return _minus(f"{estimate.value:+.{decimals_for(estimate)}f}")


def signed_interval(estimate: Estimate) -> str:
    """Return the interval of a difference: `+0.9 to +1.5`."""
    decimals = decimals_for(estimate)
    return _minus(f"{estimate.interval.low:+.{decimals}f} to {estimate.interval.high:+.{decimals}f}")


def percent(fraction: float) -> str:
    """Return a fraction as per cent: `9.8 %`, `100 %`."""
    per_cent = 100 * fraction
    return _minus(f"{per_cent:.1f} %" if abs(per_cent) < 9.95 else f"{per_cent:.0f} %")


def evaluations(counts: Mapping[str, float]) -> str:
    """Return the denoiser calls per image: `25 full`, `3 full + 22 cached`."""
    shown = [f"{count:.3g} {kind}" for kind, count in counts.items() if count]
    return " + ".join(shown) or "none"


def milliseconds(seconds: float) -> str:
    """Return a time per image: `31.2 ms`."""
    value = 1e3 * seconds
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def size(count: int) -> str:
    """Return bytes with a decimal unit: `1.81 MB`."""
    number = float(count)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _minus(text: str) -> str:
    """Return the text with minus signs in place of hyphens."""
    return text.replace("-", "−")
