"""What a change does to PSNR, measured on the same noise with and without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from errata.runtime.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class PairedChange:
    """Mean PSNR of images without and with a change, and the mean of the paired differences.

    Attributes:
        images: how many were compared.
        psnr: mean PSNR without the change, dB.
        corrected_psnr: with it.
        change: mean of the paired differences, dB.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    images: int
    psnr: float
    corrected_psnr: float
    change: float
    low: float
    high: float

    @classmethod
    def of(cls, plain: Tensor, corrected: Tensor) -> PairedChange:
        """Return the change between the PSNR of each image without, `(N,)` in dB, and with; N at least 2."""
        from errata.quality.intervals import mean_estimate  # with torch, which reading a change does not need

        change = mean_estimate(corrected - plain)
        return cls(
            images=len(plain),
            psnr=float(plain.mean()),
            corrected_psnr=float(corrected.mean()),
            change=change.value,
            low=change.interval.low,
            high=change.interval.high,
        )

    @property
    def helps(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def text(self) -> str:
        """Return it for people, as in `31.56 dB to 43.19 dB, +11.63 dB (+10.48 to +12.79) on 64 images`."""
        return (
            f"{self.psnr:.2f} dB to {self.corrected_psnr:.2f} dB, {self.change:+.2f} dB ({self.low:+.2f} to "
            f"{self.high:+.2f}) on {self.images} images"
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PairedChange:
        """Return what `to_json` was called on.

        Raises:
            ValueError: a missing or unknown key, or something else than a count and finite numbers.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ValueError(f"a measured change does not have exactly the keys {sorted(names)}")
        for name, number in value.items():
            is_number = type(number) in (int, float) and math.isfinite(number)
            if name == "images":
                is_number = type(number) is int and number >= 0
            if not is_number:
                raise ValueError(f"{name} of a measured change is {str(number)[:40]}")
        numbers = {name: float(value[name]) for name in names - {"images"}}
        return cls(images=value["images"], **numbers)


def output_map_text(scheme: Scheme, measured: PairedChange | None) -> str:
    """Return what the output map of a compressed network is, and was measured to do, for people."""
    if scheme.output is None:
        return "not calibrated"
    if measured is None:
        return "not calibrated: nothing to correct, or no images to judge by"
    if not measured.helps:
        return f"left as it is; a map changed PSNR to the float model from {measured.text()}"
    return f"calibrated; PSNR to the float model from {measured.text()}"
