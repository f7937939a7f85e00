import dataclasses
import json
from typing import Any

import pytest

from errata.correct.planner.expectation import Expectation
from errata.errors import PlanError

EXPECTED = Expectation(
    metric="Fréchet distance in quarters",
    value=2.5,
    low=2.25,
    high=3.0,
    uncorrected=4.0,
    change=-1.5,
    change_low=-2.0,
    change_high=-1.0,
    overhead=0.125,
    samples=512,
    seed=512,
    candidates_tried=20,
    reference="real images",
    confidence=0.95,
)


def test_json_round_trip() -> None:
    text = json.dumps(EXPECTED.to_json())
    assert Expectation.from_json(json.loads(text)) == EXPECTED


def test_it_says_what_was_measured() -> None:
    assert EXPECTED.is_better
    assert EXPECTED.summary() == (
        "2.5 instead of 4 (−1.5, 95% interval −2 to −1) for 12.5% overhead: Fréchet distance in quarters to "
        "real images, on 512 images that the search did not see (seeds from 512). Best of 20 candidates."
    )


def test_it_says_where_nothing_helped() -> None:
    nothing = dataclasses.replace(EXPECTED, change=0.0, change_low=-0.5, change_high=0.5)
    assert not nothing.is_better
    assert nothing.summary().startswith("None of 20 candidates is known to beat no correction: 4 as it is")


@pytest.mark.parametrize("name", ["metric", "reference"])
def test_control_codes_do_not_reach_a_terminal(name: str) -> None:
    summary = dataclasses.replace(EXPECTED, **{name: "\x1b[31mred\u202e\nline"}).summary()  # type: ignore[arg-type]
    assert summary.isprintable()
    assert r"'\x1b[31mred\u202e\nline'" in summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "2.5"}, "value='2.5' of a plan: it must be a finite number"),
        ({"value": float("nan")}, "value=nan"),
        ({"value": 10**400}, "it must be a finite number"),
        ({"high": float("inf")}, "high=inf"),
        ({"overhead": True}, "overhead=True"),
        ({"samples": 2.0}, "samples=2.0 of a plan: it must be a whole number"),
        ({"samples": 1}, "samples=1 of a plan: it must be at least 2"),
        ({"seed": -1}, "seed=-1"),
        ({"candidates_tried": 0}, "candidates_tried=0"),
        ({"metric": None}, "metric=None of a plan: it must be text"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"low": 9.0}, "low=9.0 of a plan: it must be at most high, 3.0"),
        ({"change_low": 9.0}, "change_low=9.0 of a plan: it must be at most change_high, -1.0"),
        ({"version": 7}, "Expectation version 7"),
        ({"version": True}, "Expectation version True"),
        ({"version": 1.0}, "Expectation version 1.0"),
        ({"type": "Plan"}, "expected type 'Expectation'"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_hostile_json_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        Expectation.from_json(EXPECTED.to_json() | change)


def test_a_missing_key_is_named() -> None:
    value = EXPECTED.to_json()
    del value["seed"]
    with pytest.raises(PlanError, match="has no key 'seed'"):
        Expectation.from_json(value)
    with pytest.raises(PlanError, match="expected a Expectation as a JSON object"):
        Expectation.from_json([])  # type: ignore[arg-type]
