import json
from pathlib import Path
from typing import Any

import pytest

from errata.correct import IEC, Forecast, Plan
from errata.correct.planner.expectation import Expectation
from errata.errors import PlanError

EXPECTED = Expectation(
    metric="Fréchet distance",
    value=1.0,
    low=0.5,
    high=1.5,
    uncorrected=2.0,
    change=-1.0,
    change_low=-1.5,
    change_high=-0.5,
    overhead=0.1,
    samples=64,
    seed=64,
    candidates_tried=9,
    reference="real images",
    confidence=0.95,
)
BOUND = Plan(Forecast(order=1), "all", Plan(IEC(), "0,8"), "f" * 64, EXPECTED)


@pytest.mark.parametrize("plan", [Plan.none(), Plan(IEC(step_size=0.25), "ends:1/10"), BOUND])
def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_is_plain_json_with_a_format(tmp_path: Path) -> None:
    BOUND.save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored == {"format": "errata-plan/1", "plan": BOUND.to_json()}
    assert stored["plan"]["artifact"] == "f" * 64


def test_a_later_plan_takes_the_place(tmp_path: Path) -> None:
    Plan.none().save(tmp_path / "plan.json")
    BOUND.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == BOUND


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanError, match="cannot write .*plan.json.*is a directory; choose another file"):
        BOUND.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(PlanError, match="no such file or directory"):
        BOUND.save(tmp_path / "nowhere" / "plan.json")


def changed(**change: Any) -> bytes:
    return json.dumps({"format": "errata-plan/1", "plan": BOUND.to_json() | change}).encode()


def nested(depth: int) -> bytes:
    inner = json.dumps(Plan.none().to_json())
    head, tail = inner.split('"also": null')
    text = f'{head}"also": ' * depth + inner + tail * depth
    return f'{{"format": "errata-plan/1", "plan": {text}}}'.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a plan"),
        (b"\xff\xfe", "is not a plan"),
        (b"[]", "has format None; this release reads 'errata-plan/1'"),
        (b'{"format": "errata-plan/2", "plan": {}}', "has format 'errata-plan/2'"),
        (b'{"format": "errata-plan/1", "format": "errata-plan/1"}', "duplicate key 'format'"),
        (b'{"format": "errata-plan/1"}', "missing or unknown keys: 'plan'; plan again"),
        (b'{"format": "errata-plan/1", "plan": {}, "run": 1}', "missing or unknown keys: 'run'"),
        (b'{"format": "errata-plan/1", "plan": {}, "\\u001b[31mx": 1}', r"unknown keys: '\\x1b\[31mx'"),
        (changed(version=True), "version True"),
        (changed(version=float(Plan.none().to_json()["version"])), r"version \d\.0"),
        (changed(expected=EXPECTED.to_json() | {"value": 10**400}), "value=1000.*a finite number"),
        (b'{"format": "errata-plan/1", "plan": 3}', "expected a Plan as a JSON object, got 3"),
        (b" " * (2**20 + 1), "is larger than 1,048,576 bytes"),
        (changed(version=99), "version 99"),
        (changed(method={"type": "os.system"}), "unknown correction method 'os.system'"),
        (changed(steps="sometimes"), "'sometimes' is not a selection of steps"),
        (changed(steps=3), "steps must be a string"),
        (changed(artifact=3), "artifact is 3"),
        (changed(also=[]), "expected a Plan as a JSON object"),
        (changed(expected={}), "expected type 'Expectation'"),
        (changed(expected=EXPECTED.to_json() | {"value": "much"}), "value='much'"),
        (changed(surprise=1), "unknown key 'surprise'"),
        (nested(3000), "nested too deep"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(data)
    with pytest.raises(PlanError, match=message) as refusal:
        Plan.load(file)
    assert "plan.json" in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read .*no such file.*give a file that `errata plan` wrote"):
        Plan.load(tmp_path / "plan.json")
