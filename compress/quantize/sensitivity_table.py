"""The result of a sensitivity measurement: as text, JSON and CSV, with a suggestion what to spare."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

# The suggestion spares the fewest layers that make up this share of the summed squared error.
_SHARE = 0.5
_SHOWN_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """One layer, or the matrix products of one attention, quantized alone.

    Attributes:
        name: of the layer or attention.
        scheme: short text, such as `w4a8` or `attention a8`.
        weight_bits: None for an attention, which has no weights of its own.
        weights: how many.
        errors: relative error of the network's prediction at every measured step.
    """

    name: str
    scheme: str
    weight_bits: int | None
    weights: int
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean error over the steps."""
        return sum(self.errors) / len(self.errors)

    @property
    def worst(self) -> float:
        """Largest error of any step."""
        return max(self.errors)


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """Sensitivity of every layer and attention.

    Attributes:
        recipe: its name.
        steps: indices of the measured steps.
        samples: recorded samples asked for at each step.
        rows: in the order of the network's modules.
    """

    recipe: str
    steps: tuple[int, ...]
    samples: int
    rows: tuple[SensitivityRow, ...]

    def ranked(self) -> tuple[SensitivityRow, ...]:
        """Return the rows by mean error, worst first."""
        return tuple(sorted(self.rows, key=lambda row: (-row.mean, row.name)))

    def heaviest(self, share: float = _SHARE) -> tuple[SensitivityRow, ...]:
        """Return the fewest rows that make up this share of the summed squared mean errors, worst first.

        Errors of different layers are close to independent, so their squares add up.
        """
        total = sum(row.mean**2 for row in self.rows)
        chosen: list[SensitivityRow] = []
        for row in self.ranked():
            if sum(found.mean**2 for found in chosen) >= share * total:
                break
            chosen.append(row)
        return tuple(chosen)

    def suggestion(self) -> str:
        """Return which rows to keep at 8 bits and which in floating point, in a sentence or two."""
        heaviest = self.heaviest()
        if not heaviest:
            return "suggestion: nothing to spare, no layer has any error"
        total = sum(row.mean**2 for row in self.rows)
        share = sum(row.mean**2 for row in heaviest) / total
        four = [row for row in heaviest if row.weight_bits is not None and row.weight_bits < 8]
        others = [row for row in heaviest if row not in four]
        part = sum(row.weights for row in heaviest) / max(1, sum(row.weights for row in self.rows))
        wishes = []
        if four:
            wishes.append(f"8 bits (bits, --bits NAME=8) for {_names(four)}")
        if others:
            wishes.append(f"floating point (modules_to_not_convert, --keep NAME) for {_names(others)}")
        return (
            f"suggestion: {'; '.join(wishes)} ({len(heaviest)} of {len(self.rows)} rows, {part:.1%} of the "
            f"weights, {share:.0%} of the summed squared error)"
        )

    def text(self) -> str:
        """Return aligned columns, worst mean first, then the suggestion."""
        head = ("layer or attention", "scheme", "weights", "mean error", "worst error", "at step")
        lines = [head, *(self._cells(row) for row in self.ranked())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        shown = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        title = f"{self.recipe}: one at a time, {len(self.steps)} steps, {self.samples} samples each"
        return "\n".join([title, *shown, self.suggestion()]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        rows = [
            {
                "name": row.name,
                "scheme": row.scheme,
                "weight_bits": row.weight_bits,
                "weights": row.weights,
                "mean": row.mean,
                "worst": row.worst,
                "errors": list(row.errors),
            }
            for row in self.rows
        ]
        return {
            "recipe": self.recipe,
            "steps": list(self.steps),
            "samples": self.samples,
            "rows": rows,
            "suggested": [row.name for row in self.heaviest()],
        }

    def to_csv(self) -> str:
        """Return CSV: a line for each row, in the order of the modules; a column for each step."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        columns = [f"step {step}" for step in self.steps]
        writer.writerow(["name", "scheme", "weight_bits", "weights", "mean", "worst", *columns])
        for row in self.rows:
            bits = "" if row.weight_bits is None else row.weight_bits
            writer.writerow([row.name, row.scheme, bits, row.weights, row.mean, row.worst, *row.errors])
        return stream.getvalue()

    def _cells(self, row: SensitivityRow) -> tuple[str, ...]:
        step = self.steps[row.errors.index(row.worst)]
        weights = f"{row.weights:,}" if row.weights else "-"
        return (row.name, row.scheme, weights, f"{row.mean:.3%}", f"{row.worst:.3%}", str(step))


def _names(rows: list[SensitivityRow]) -> str:
    names = [row.name for row in rows[:_SHOWN_NAMES]]
    return ", ".join(names) + (f" and {len(rows) - len(names)} more" if len(rows) > len(names) else "")
