"""The plain options of a report, with their documentation: one list for Python and for the command line.

To add an option, add a field to `ReportOptions` and its type to `OptionValues`, and use it where it matters:
`errata.report.run`, `errata report`, its help, and the command that a report says it was made by follow.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, TypedDict

from errata.errors import ReportError


class OptionValues(TypedDict, total=False):
    """Types of the fields of `ReportOptions`, for keyword arguments."""

    samples: int
    batch_size: int
    seed: int
    compute_matched: bool
    amplification: str | None
    resamples: int
    shown: int
    equal_compute: bool


def _option(
    default: Any, about: str, *, least: int | None = None, metavar: str = "N", old_flag: str = ""
) -> Any:
    """Return a dataclass field; `old_flag` is an earlier name of its command-line option."""
    return field(
        default=default, metadata={"about": about, "least": least, "metavar": metavar, "old_flag": old_flag}
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Plain options of a report; each is an option of `errata report` of the same name.

    Attributes:
        samples: images per row.
        batch_size: images per batch. Each batch runs under all plans in turn, so that times compare.
        seed: of image 0; image i starts from `seed + i` in every row.
        compute_matched: whether to add compute-matched alternatives, see `errata.report.compute_matched`.
        amplification: denoiser calls, such as "0,12,24", at which to measure how much a step amplifies an
            error; None measures it nowhere. Each takes hundreds of evaluations.
        resamples: bootstrap resamples per interval.
        shown: images of each row that the page shows.

    Raises:
        ReportError: a number is too small.
    """

    samples: int = _option(256, "images per row", least=2)
    batch_size: int = _option(64, "images per batch", least=1)
    seed: int = _option(0, "seed of image 0, image i has seed N + i", metavar="SEED")
    compute_matched: bool = _option(
        True, "do not measure compute-matched alternatives", old_flag="--no-equal-compute"
    )
    amplification: str | None = _option(
        None, "denoiser calls at which to measure error amplification, such as 0,12,24; slow", metavar="STEPS"
    )
    resamples: int = _option(200, "bootstrap resamples per interval", least=2)
    shown: int = _option(16, "images of each row on the page", least=0)

    def __post_init__(self) -> None:
        for name, about in self.__dataclass_fields__.items():
            least = about.metadata.get("least")
            if least is not None and getattr(self, name) < least:
                raise ReportError(f"{name}={getattr(self, name)}; it must be at least {least}")


def current_options(options: OptionValues) -> dict[str, Any]:
    """Return the options with names of earlier releases replaced, which warns."""
    values: dict[str, Any] = dict(options)
    if "equal_compute" in values:
        warnings.warn(
            "equal_compute is now compute_matched; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=3,
        )
        values.setdefault("compute_matched", values.pop("equal_compute"))
    return values
