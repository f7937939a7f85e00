"""One plain sentence for each row: did the correction help, hurt, or drown in sampling noise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.quality.intervals import Estimate
from errata.report import formatting

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

NamedRival = tuple[str, Estimate, Estimate]
"""What a rival is, a row's distance minus the rival's, and that at the confidence for all rivals at once."""


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
    rivals: Sequence[NamedRival] = (),
) -> Verdict:
    """Verdict on a corrected row against the same artifact without correction, and against its rivals.

    frechet: of the corrected row. overhead: as a fraction. dimension: number of features.
    same_steps_as: an earlier plan that corrects the same steps. rivals: other uses of no more compute.

    It pays where it is better than every one of them (each at 95 %: to be better than all by chance is rarer
    still), and does not where any one is better (at 95 % for all of them together). Without rivals it is only
    better, or worse, than no correction.
    """
    repeated = f"Same steps as {same_steps_as}. " if same_steps_as is not None else ""
    warning = rank_warning(samples=samples, dimension=dimension)
    if warning:
        sentence = f"Not distinguishable at n={samples}, which is too few samples: {warning}"
        return Verdict("not distinguishable", repeated + sentence + _pixel_remark(psnr_change))
    told = _Told(frechet, change, overhead, samples)
    kind, sentence = told.against(rivals) if rivals else told.alone()
    return Verdict(kind, repeated + sentence + _pixel_remark(psnr_change))


class _Told:
    """A corrected row in words."""

    def __init__(self, frechet: float, change: Estimate, overhead: float, samples: int) -> None:
        self._frechet, self._change, self._samples = frechet, change, samples
        decimals = formatting.decimals_for(change)
        self._step = (
            f"from {frechet - change.value:.{decimals}f} to {frechet:.{decimals}f} ({_signed(change)})"
        )
        self._cost = f"{formatting.percent(overhead)} overhead"

    def alone(self) -> tuple[VerdictKind, str]:
        """Against no correction."""
        kind = judge_change(self._change)
        return kind, {
            "better": f"Better: the distance falls {self._step} for {self._cost}.",
            "worse": f"Worse: correction raises the distance {self._step} and costs {self._cost}; "
            "leave it off here.",
            "not distinguishable": f"Not distinguishable at n={self._samples}: {self._step} for "
            f"{self._cost}.",
        }[kind]

    def against(self, rivals: Sequence[NamedRival]) -> tuple[VerdictKind, str]:
        """Against no correction and everything else that costs no more."""
        strongest = max(rivals, key=lambda rival: rival[1].value)
        is_better_than_all = self._change.interval.high < 0 and all(
            difference.interval.high < 0 for _, difference, _ in rivals
        )
        if is_better_than_all:
            return "pays", (
                f"Pays: the distance falls {self._step} for {self._cost}, and nothing else that costs no "
                f"more comes as low; the closest is {self._told_of(strongest)}."
            )
        if self._change.interval.low > 0:
            return "does not pay", (
                f"Does not pay: correction raises the distance {self._step} and costs {self._cost}; "
                "leave it off here."
            )
        winners = [rival for rival in rivals if rival[2].interval.low > 0]
        if winners:
            best = max(winners, key=lambda rival: rival[1].value)
            return "does not pay", (
                f"Does not pay: it takes the distance {self._step} for {self._cost}, but for no more compute "
                f"another way is better, {self._told_of(best)}."
            )
        return "not distinguishable", (
            f"Not distinguishable at n={self._samples}: {self._step} for {self._cost}; the best other use of "
            f"that compute is {self._told_of(strongest)}."
        )

    def _told_of(self, rival: NamedRival) -> str:
        name, difference, _ = rival
        value = f"{self._frechet - difference.value:.{formatting.decimals_for(difference)}f}"
        return (
            f"{name}, with {value} (this plan minus that: {formatting.signed(difference)}, "
            f"{formatting.signed_interval(difference)})"
        )


def verdict_of_rival(stands_for: str) -> Verdict:
    """What a row is that the report added."""
    return Verdict("equal compute", f"For comparison: {stands_for}.")


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
    found: dict[str, list[str]] = {"better": [], "worse": [], "not distinguishable": []}
    if any(kind in ("pays", "does not pay") for _, kind in judged):
        return _counts_of_paying(judged, samples)
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


def _counts_of_paying(judged: Sequence[tuple[str, VerdictKind]], samples: int) -> str:
    found: dict[str, list[str]] = {"pays": [], "does not pay": [], "not distinguishable": []}
    for artifact, kind in judged:
        if kind in found:
            found[kind].append(artifact)
    total, unsure = sum(map(len, found.values())), len(found["not distinguishable"])
    untold = f" Of {unsure} it cannot be told with {samples} samples." if unsure else ""
    if not found["pays"]:
        return f"None of {total} corrected runs beats everything else that the same compute buys.{untold}"
    return (
        f"{_counted(found['pays'])} of {total} corrected runs paid: they beat everything else that the same "
        f"compute buys. {_counted(found['does not pay'])} did not.{untold}"
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
