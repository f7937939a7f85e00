"""One plain sentence for each row: did the correction help, hurt, or drown in sampling noise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.quality.intervals import Estimate
from errata.report import formatting

VerdictKind = Literal["better", "worse", "not distinguishable", "uncorrected", "float"]


@dataclass(frozen=True)
class Verdict:
    """`kind` for machines and badges, `sentence` for people."""

    kind: VerdictKind
    sentence: str


def judge_change(change: Estimate) -> VerdictKind:
    """Kind of a paired change of a distance: its interval decides, never the value alone."""
    if not change.interval.excludes_zero:
        return "not distinguishable"
    return "better" if change.interval.high < 0 else "worse"


def rank_warning(*, samples: int, dimension: int) -> str:
    """What is wrong with so few samples in so many features; empty where nothing is."""
    if samples > dimension:
        return ""
    return (
        f"{samples} samples cannot give a covariance of full rank in {dimension} features; "
        f"take at least {dimension + 1}, better ten times as many."
    )


def verdict_of_corrected(
    *,
    frechet: float,
    change: Estimate,
    overhead: float,
    samples: int,
    dimension: int = 0,
    psnr_change: Estimate | None = None,
    same_steps_as: str | None = None,
) -> Verdict:
    """Verdict on a corrected row against the same artifact without correction.

    frechet: of the corrected row. overhead: as a fraction. dimension: number of features.
    same_steps_as: an earlier plan that corrects the same steps.
    """
    repeated = f"Same steps as {same_steps_as}. " if same_steps_as is not None else ""
    warning = rank_warning(samples=samples, dimension=dimension)
    if warning:
        sentence = f"Not distinguishable at n={samples}, which is too few samples: {warning}"
        return Verdict("not distinguishable", repeated + sentence + _pixel_remark(psnr_change))
    kind = judge_change(change)
    decimals = formatting.decimals_for(change)
    step = f"from {frechet - change.value:.{decimals}f} to {frechet:.{decimals}f} ({_signed(change)})"
    cost = formatting.percent(overhead)
    sentence = {
        "better": f"Better: the distance falls {step} for {cost} overhead.",
        "worse": f"Worse: correction raises the distance {step} and costs {cost}; leave it off here.",
        "not distinguishable": f"Not distinguishable at n={samples}: {step} for {cost} overhead.",
    }[kind]
    return Verdict(kind, repeated + sentence + _pixel_remark(psnr_change))


def verdict_of_uncorrected(*, samples: int, change_to_float: Estimate | None, dimension: int = 0) -> Verdict:
    """Verdict on an uncorrected artifact against the float model, where that was measured."""
    if change_to_float is None:
        return Verdict("uncorrected", "No correction: what the plans of this artifact are compared with.")
    warning = rank_warning(samples=samples, dimension=dimension)
    if warning:
        sentence = f"Not distinguishable from the float model at n={samples}, which is too few samples"
        return Verdict("uncorrected", f"{sentence}: {warning}")
    sentence = {
        "better": "Compressed, it has a smaller distance than the float model",
        "worse": "Compression raises the distance over the float model",
        "not distinguishable": f"Not distinguishable from the float model at n={samples}",
    }[judge_change(change_to_float)]
    return Verdict("uncorrected", f"{sentence} ({_signed(change_to_float)}).")


def verdict_of_float(*, samples: int) -> Verdict:
    """Verdict on the float model: the row that the others are compared with."""
    return Verdict(
        "float", f"The float model itself, at n={samples}: the same distance would mean nothing lost."
    )


def headline(judged: Sequence[tuple[str, VerdictKind]], *, samples: int, dimension: int = 0) -> str:
    """One sentence over all rows, given as artifact and kind; a second one where the samples are too few."""
    warning = rank_warning(samples=samples, dimension=dimension)
    return f"{_counts(judged, samples)} Too few samples: {warning}" if warning else _counts(judged, samples)


def _counts(judged: Sequence[tuple[str, VerdictKind]], samples: int) -> str:
    found: dict[VerdictKind, list[str]] = {"better": [], "worse": [], "not distinguishable": []}
    for artifact, kind in judged:
        if kind in found:
            found[kind].append(artifact)
    total = sum(map(len, found.values()))
    if not total:
        return "Nothing was corrected: the table shows what compression alone costs."
    if not found["better"] and not found["worse"]:
        return f"At {samples} samples, no correction made a difference that can be told from sampling noise."
    return (
        f"Of {total} corrected runs, correction helped in {_counted(found['better'])}, hurt in "
        f"{_counted(found['worse'])}, and made no difference that {samples} samples can show in "
        f"{len(found['not distinguishable'])}."
    )


def _counted(artifacts: Sequence[str]) -> str:
    return f"{len(artifacts)} ({', '.join(dict.fromkeys(artifacts))})" if artifacts else "0"


def _signed(change: Estimate) -> str:
    return f"{formatting.signed(change)}, 95 % interval {formatting.signed_interval(change)}"


def _pixel_remark(psnr_change: Estimate | None) -> str:
    if psnr_change is None or not psnr_change.interval.excludes_zero:
        return ""
    moved = "closer to" if psnr_change.value > 0 else "further from"
    return f" Its images are {moved} the float model's ({formatting.signed(psnr_change)} dB)."
