"""One sentence for each row: did the correction help, hurt, or is the difference within sampling noise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.quality import formatting
from errata.quality.intervals import Estimate

VerdictKind = Literal[
    "pays",
    "does not pay",
    "better",
    "worse",
    "not distinguishable",
    "uncorrected",
    "float",
    "equal compute",
]

NamedAlternative = tuple[str, Estimate, Estimate]
"""An alternative: its name, a row's distance minus its own, and that at the joint confidence of all."""

# What people read in place of a kind.
_LABELS: dict[str, str] = {"equal compute": "compute-matched", "float": "reference"}


@dataclass(frozen=True)
class Verdict:
    """`kind` for programs, `sentence` and `label` for people."""

    kind: VerdictKind
    sentence: str

    @property
    def label(self) -> str:
        """The kind in a word or two."""
        return _LABELS.get(self.kind, self.kind)


def judge_change(change: Estimate) -> VerdictKind:
    """Return the kind of a paired change of a distance; its interval decides, never the value alone."""
    if not change.interval.excludes_zero:
        return "not distinguishable"
    return "better" if change.interval.high < 0 else "worse"


def rank_warning(*, samples: int, dimension: int) -> str:
    """Return what is wrong with so few samples in so many features; empty if nothing is."""
    if samples > dimension:
        return ""
    return (
        f"{samples} samples cannot give a covariance of full rank in {dimension} features; "
        f"use at least {dimension + 1}, preferably ten times as many."
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
    alternatives: Sequence[NamedAlternative] = (),
) -> Verdict:
    """Return the verdict on a corrected row, against no correction and its compute-matched alternatives.

    frechet: of the corrected row. overhead: as a fraction. dimension: number of features.
    same_steps_as: an earlier plan that corrects the same steps. alternatives: other uses of no more compute.

    It pays if it is better than every alternative (each at 95 %; beating all of them by chance is rarer
    still), and does not pay if any one is better (at 95 % for all of them jointly). Without alternatives it
    is only better or worse than no correction.
    """
    repeated = f"Same steps as {same_steps_as}. " if same_steps_as is not None else ""
    warning = rank_warning(samples=samples, dimension=dimension)
    if warning:
        sentence = f"Not distinguishable at n={samples}, which is too few samples: {warning}"
        return Verdict("not distinguishable", repeated + sentence + _pixel_remark(psnr_change))
    wording = _Wording(frechet, change, overhead, samples)
    kind, sentence = wording.against(alternatives) if alternatives else wording.alone()
    return Verdict(kind, repeated + sentence + _pixel_remark(psnr_change))


class _Wording:
    """A corrected row, in words."""

    def __init__(self, frechet: float, change: Estimate, overhead: float, samples: int) -> None:
        self._frechet, self._change, self._samples = frechet, change, samples
        decimals = formatting.decimals_for(change)
        self._step = (
            f"from {frechet - change.value:.{decimals}f} to {frechet:.{decimals}f} ({_signed(change)})"
        )
        self._cost = f"{formatting.percent(overhead)} overhead"

    def alone(self) -> tuple[VerdictKind, str]:
        """Return kind and sentence against no correction."""
        kind = judge_change(self._change)
        return kind, {
            "better": f"Better: the distance falls {self._step} for {self._cost}.",
            "worse": f"Worse: correction raises the distance {self._step} and costs {self._cost}; "
            "turn it off here.",
            "not distinguishable": f"Not distinguishable at n={self._samples}: {self._step} for "
            f"{self._cost}.",
        }[kind]

    def against(self, alternatives: Sequence[NamedAlternative]) -> tuple[VerdictKind, str]:
        """Return kind and sentence against no correction and every compute-matched alternative."""
        strongest = max(alternatives, key=lambda alternative: alternative[1].value)
        is_better_than_all = self._change.interval.high < 0 and all(
            difference.interval.high < 0 for _, difference, _ in alternatives
        )
        if is_better_than_all:
            return "pays", (
                f"Pays: the distance falls {self._step} for {self._cost}, and every compute-matched "
                f"alternative is worse; the best of them is {self._named(strongest)}."
            )
        if self._change.interval.low > 0:
            return "does not pay", (
                f"Does not pay: correction raises the distance {self._step} and costs {self._cost}; "
                "turn it off here."
            )
        winners = [alternative for alternative in alternatives if alternative[2].interval.low > 0]
        if winners:
            best = max(winners, key=lambda alternative: alternative[1].value)
            return "does not pay", (
                f"Does not pay: the distance goes {self._step} for {self._cost}, but a compute-matched "
                f"alternative is better: {self._named(best)}."
            )
        return "not distinguishable", (
            f"Not distinguishable at n={self._samples}: {self._step} for {self._cost}; the best "
            f"compute-matched alternative is {self._named(strongest)}."
        )

    def _named(self, alternative: NamedAlternative) -> str:
        name, difference, _ = alternative
        value = f"{self._frechet - difference.value:.{formatting.decimals_for(difference)}f}"
        return (
            f"{name}, at {value} (this plan minus it: {formatting.signed(difference)}, "
            f"{formatting.signed_interval(difference)})"
        )


def verdict_of_alternative(stands_for: str) -> Verdict:
    """Return the verdict on a row that the report added: what it is."""
    return Verdict("equal compute", f"For comparison: {stands_for}.")


def verdict_of_uncorrected(*, samples: int, change_to_float: Estimate | None, dimension: int = 0) -> Verdict:
    """Return the verdict on an uncorrected artifact against the float model, if that was measured."""
    if change_to_float is None:
        return Verdict("uncorrected", "No correction: the baseline of this artifact's plans.")
    warning = rank_warning(samples=samples, dimension=dimension)
    if warning:
        sentence = f"Not distinguishable from the float model at n={samples}, which is too few samples"
        return Verdict("uncorrected", f"{sentence}: {warning}")
    sentence = {
        "better": "Compression lowers the distance below the float model's",
        "worse": "Compression raises the distance above the float model's",
        "not distinguishable": f"Not distinguishable from the float model at n={samples}",
    }[judge_change(change_to_float)]
    return Verdict("uncorrected", f"{sentence} ({_signed(change_to_float)}).")


def verdict_of_float(*, samples: int) -> Verdict:
    """Return the verdict on the float model: what an equal distance would mean."""
    return Verdict(
        "float", f"The float model (n={samples}): an artifact with the same distance has lost nothing."
    )


def headline(kinds: Sequence[tuple[str, VerdictKind]], *, samples: int, dimension: int = 0) -> str:
    """Return a sentence on all rows, given as artifact and kind, and another if samples are too few."""
    warning = rank_warning(samples=samples, dimension=dimension)
    return f"{_counts(kinds, samples)} Too few samples: {warning}" if warning else _counts(kinds, samples)


def _counts(kinds: Sequence[tuple[str, VerdictKind]], samples: int) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "not distinguishable": []}
    if any(kind in ("pays", "does not pay") for _, kind in kinds):
        return _counts_of_paying(kinds, samples)
    for artifact, kind in kinds:
        if kind in found:
            found[kind].append(artifact)
    total = sum(map(len, found.values()))
    if not total:
        return "Nothing was corrected: the table shows what compression alone costs."
    if not found["better"] and not found["worse"]:
        return f"With {samples} samples, no correction made a difference beyond sampling noise."
    return (
        f"Of {total} corrected runs, better: {_counted(found['better'])}; worse: {_counted(found['worse'])}; "
        f"inconclusive with {samples} samples: {len(found['not distinguishable'])}."
    )


def _counts_of_paying(kinds: Sequence[tuple[str, VerdictKind]], samples: int) -> str:
    found: dict[str, list[str]] = {"pays": [], "does not pay": [], "not distinguishable": []}
    alone: dict[str, list[str]] = {"better": [], "worse": []}
    for artifact, kind in kinds:
        for group in (found, alone):
            if kind in group:
                group[kind].append(artifact)
    total, unsure = sum(map(len, found.values())), len(found["not distinguishable"])
    rest = f" Inconclusive with {samples} samples: {unsure}." if unsure else ""
    told = [f"{kind}: {_counted(artifacts)}" for kind, artifacts in alone.items() if artifacts]
    # Rows that cost nothing, on an artifact where nothing else costs nothing.
    lead = f"With no alternative at their cost, {' and '.join(told)}. " if told else ""
    if not found["pays"]:
        others = "other corrected runs" if told else "corrected runs"
        return f"{lead}0 of {total} {others} beat every compute-matched alternative.{rest}"
    return (
        f"{lead}Of {total} corrected runs, those that beat every compute-matched alternative: "
        f"{_counted(found['pays'])}. Those that do not: {_counted(found['does not pay'])}.{rest}"
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
