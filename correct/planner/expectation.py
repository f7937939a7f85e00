"""What a plan was measured to do when it was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from errata.correct.config_json import StoredDataclass
from errata.correct.validation import is_number
from errata.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Expectation(StoredDataclass):
    """A plan's quality and price, measured from noise that played no part in its choice.

    No correction is what is left, so the images that candidates were compared with may serve for it.

    Attributes:
        metric: what was measured; smaller is better.
        value: the metric of the plan.
        low, high: interval of `value`.
        uncorrected: the metric of the same artifact without correction, from the same noise.
        change: `value - uncorrected`.
        change_low, change_high: interval of `change`, paired.
        overhead: measured extra time of the plan's denoiser calls, as a fraction.
        samples: number of images measured, at least 2.
        seed: of the first of these images; image i has the seed `seed + i`.
        candidates_tried: plans that were compared to find this one, including no correction.
        reference: what the images were compared with.
        confidence: of the intervals.

    Raises:
        PlanError: a value of another type, not finite, or out of range.
    """

    metric: str
    value: float
    low: float
    high: float
    uncorrected: float
    change: float
    change_low: float
    change_high: float
    overhead: float
    samples: int
    seed: int
    candidates_tried: int
    reference: str
    confidence: float

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, str(item.type), getattr(self, item.name))
        for name, least in (("samples", 2), ("seed", 0), ("candidates_tried", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        _require(0 < self.confidence < 1, "confidence", self.confidence, "in (0, 1)")
        _require(self.low <= self.high, "low", self.low, f"at most high, {self.high!r}")
        ordered = self.change_low <= self.change_high
        _require(ordered, "change_low", self.change_low, f"at most change_high, {self.change_high!r}")

    @property
    def is_better(self) -> bool:
        """Whether the plan beats no correction by more than the noise of the measurement."""
        return self.change_high < 0

    def summary(self) -> str:
        """Return one sentence in one line, without control codes of a terminal."""
        measured = f"{_printable(self.metric)} to {_printable(self.reference)}, on {self.samples} images"
        if not self.is_better:
            return (
                f"None of {self.candidates_tried} candidates is known to beat no correction: "
                f"{self.uncorrected:.4g} as it is, {measured} (seeds from {self.seed})."
            )
        measured += f" that the search did not see (seeds from {self.seed})"
        change = (
            f"{self.change:+.3g}, {self.confidence:.0%} interval {self.change_low:+.3g} to "
            f"{self.change_high:+.3g}"
        ).replace("-", "−")
        return (
            f"{self.value:.4g} instead of {self.uncorrected:.4g} ({change}) for {self.overhead:.1%} "
            f"overhead: {measured}. Best of {self.candidates_tried} candidates."
        )


def _printable(text: str) -> str:
    """Return the text, quoted with escapes if it is not printable; it may come from a file."""
    return text if text.isprintable() else repr(text)


def _check_type(name: str, kind: str, value: object) -> None:
    if kind == "str":
        _require(isinstance(value, str), name, value, "text")
    elif kind == "int":
        _require(isinstance(value, int) and not isinstance(value, bool), name, value, "a whole number")
    else:
        is_finite = is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
        _require(is_finite, name, value, "a finite number")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise PlanError(f"expected {name}={value!r} of a plan: it must be {allowed}; plan again")
