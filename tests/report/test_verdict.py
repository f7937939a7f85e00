import pytest

from errata.report import Estimate, Interval
from errata.report.verdict import (
    VerdictKind,
    headline,
    judge_change,
    verdict_of_corrected,
    verdict_of_uncorrected,
)


def change(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, Interval(low, high))


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-2.0, -0.1, "better"),
        (0.1, 2.0, "worse"),
        (-2.0, 0.1, "not distinguishable"),
        (-0.1, 2.0, "not distinguishable"),
        (0.0, 0.0, "not distinguishable"),
        (-1.0, 0.0, "not distinguishable"),
    ],
)
def test_the_interval_decides(low: float, high: float, kind: VerdictKind) -> None:
    assert judge_change(change(low, high)) == kind


def test_a_correction_that_hurts_is_told_plainly() -> None:
    verdict = verdict_of_corrected(frechet=9.0, change=change(1.0, 3.0), overhead=1.0, samples=256)
    assert verdict.kind == "worse"
    assert verdict.sentence == (
        "Worse: correction raises the distance from 7.0 to 9.0 (+2.0, 95 % interval +1.0 to +3.0) "
        "and costs 100 % overhead; turn it off here."
    )


def test_a_correction_that_helps_names_its_price_and_the_pixels() -> None:
    verdict = verdict_of_corrected(
        frechet=5.0, change=change(-3.0, -1.0), overhead=0.028, samples=256, psnr_change=change(0.2, 0.4)
    )
    assert verdict.kind == "better"
    assert "falls from 7.0 to 5.0 (−2.0, 95 % interval −3.0 to −1.0) for 2.8 % overhead." in verdict.sentence
    assert verdict.sentence.endswith("Its images are closer to the float model's (+0.30 dB).")


def test_noise_is_called_noise() -> None:
    verdict = verdict_of_corrected(
        frechet=5.0, change=change(-1.0, 0.8), overhead=0.2, samples=256, psnr_change=change(-0.1, 0.1)
    )
    assert verdict.kind == "not distinguishable"
    assert verdict.sentence.startswith("Not distinguishable at n=256: from 5.10 to 5.00")
    assert "dB" not in verdict.sentence


def test_an_uncorrected_artifact_is_compared_with_the_float_model() -> None:
    assert "No correction" in verdict_of_uncorrected(samples=9, change_to_float=None).sentence
    worse = verdict_of_uncorrected(samples=9, change_to_float=change(1.0, 3.0))
    assert worse.sentence.startswith("Compression raises the distance")
    assert worse.kind == "uncorrected"


def test_headline_counts() -> None:
    kinds: list[tuple[str, VerdictKind]] = [
        ("float", "float"),
        ("a", "uncorrected"),
        ("a", "better"),
        ("a", "better"),
        ("b", "better"),
        ("b", "not distinguishable"),
    ]
    assert headline(kinds, samples=256) == (
        "Of 4 corrected runs, better: 3 (a, b); worse: 0; inconclusive with 256 samples: 1."
    )
    assert "no correction made a difference" in headline([("a", "not distinguishable")], samples=64)
    assert "Nothing was corrected" in headline([("a", "uncorrected")], samples=64)


def test_too_few_samples_decide_nothing() -> None:
    few = verdict_of_corrected(
        frechet=9.0, change=change(1.0, 3.0), overhead=1.0, samples=4, dimension=4, psnr_change=None
    )
    assert few.kind == "not distinguishable"
    assert few.sentence == (
        "Not distinguishable at n=4, which is too few samples: 4 samples cannot give a covariance of full "
        "rank in 4 features; use at least 5, preferably ten times as many."
    )
    enough = verdict_of_corrected(frechet=9.0, change=change(1.0, 3.0), overhead=1.0, samples=5, dimension=4)
    assert enough.kind == "worse"
    plain = verdict_of_uncorrected(samples=4, change_to_float=change(1.0, 3.0), dimension=4)
    assert plain.sentence.startswith("Not distinguishable from the float model at n=4, which is too few")
    said = headline([("a", "not distinguishable")], samples=4, dimension=4)
    assert said.endswith("Too few samples: " + few.sentence.split(": ")[1])


def test_a_repeated_plan_says_so() -> None:
    verdict = verdict_of_corrected(
        frechet=9.0, change=change(1.0, 3.0), overhead=1.0, samples=256, same_steps_as="ends:1/10"
    )
    assert verdict.kind == "worse"
    assert verdict.sentence.startswith("Same steps as ends:1/10. Worse: ")


def alternative(name: str, low: float, high: float, *, joint: float = 0.0) -> tuple[str, Estimate, Estimate]:
    """An alternative that the row is `low` to `high` above; its joint interval reaches `joint` further."""
    return name, change(low, high), change(low - joint, high + joint)


def judged(
    *alternatives: tuple[str, Estimate, Estimate], low: float = -3.0, high: float = -1.0
) -> tuple[str, str]:
    verdict = verdict_of_corrected(
        frechet=5.0, change=change(low, high), overhead=0.3, samples=256, alternatives=alternatives
    )
    return verdict.kind, verdict.sentence


def test_it_pays_where_it_beats_everything_else() -> None:
    kind, sentence = judged(
        alternative("no correction, 30 steps", -1.0, -0.2), alternative("another", -2.0, -1.5)
    )
    assert kind == "pays"
    assert sentence == (
        "Pays: the distance falls from 7.0 to 5.0 (−2.0, 95 % interval −3.0 to −1.0) for 30 % overhead, and "
        "every compute-matched alternative is worse; the best of them is no correction, 30 steps, at 5.60 "
        "(this plan minus it: −0.60, −1.00 to −0.20)."
    )


def test_it_does_not_pay_where_the_same_compute_buys_more() -> None:
    kind, sentence = judged(
        alternative("no correction, 30 steps", 0.5, 1.5), alternative("another", -2.0, -1.5)
    )
    assert kind == "does not pay"
    assert "but a compute-matched alternative is better: no correction, 30 steps, at 4.00" in sentence


def test_it_does_not_pay_where_it_hurts_whatever_the_others_do() -> None:
    kind, sentence = judged(alternative("another", -2.0, -1.5), low=0.5, high=1.5)
    assert kind == "does not pay"
    assert "correction raises the distance from 4.00 to 5.00" in sentence


def test_many_alternatives_have_many_chances_to_look_better() -> None:
    """An alternative that is better alone, but not at the joint confidence of all, decides nothing."""
    kind, sentence = judged(alternative("lucky", 0.1, 1.5, joint=0.2), alternative("another", -2.0, -1.5))
    assert kind == "not distinguishable"
    assert "the best compute-matched alternative is lucky, at 4.20" in sentence


def test_a_gain_that_is_noise_does_not_pay() -> None:
    assert judged(alternative("another", -2.0, -1.5), low=-1.0, high=0.2)[0] == "not distinguishable"


def test_the_headline_counts_what_paid() -> None:
    kinds: list[tuple[str, VerdictKind]] = [
        ("a", "pays"),
        ("a", "does not pay"),
        ("b", "does not pay"),
        ("b", "not distinguishable"),
        ("b", "uncorrected"),
        ("b", "equal compute"),
    ]
    assert headline(kinds, samples=256) == (
        "Of 4 corrected runs, those that beat every compute-matched alternative: 1 (a). Those that do not: 2 "
        "(a, b). Inconclusive with 256 samples: 1."
    )
    assert headline(kinds[1:3], samples=256) == (
        "0 of 2 corrected runs beat every compute-matched alternative."
    )


def test_the_headline_counts_rows_without_an_alternative_as_well() -> None:
    kinds: list[tuple[str, VerdictKind]] = [("a", "does not pay"), ("b", "better"), ("c", "worse")]
    assert headline(kinds, samples=256) == (
        "With no alternative at their cost, better: 1 (b) and worse: 1 (c). "
        "0 of 1 other corrected runs beat every compute-matched alternative."
    )
    assert headline([*kinds[:2], ("a", "pays")], samples=256) == (
        "With no alternative at their cost, better: 1 (b). Of 2 corrected runs, those that beat every "
        "compute-matched alternative: 1 (a). Those that do not: 1 (a)."
    )
