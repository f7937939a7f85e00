import pytest

from errata.correct import steps
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

TWENTY = CacheSchedule.uniform(20, interval=5, branch=1)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("all", list(range(20))),
        ("none", []),
        ("full", [0, 5, 10, 15]),
        ("ends:1/10", [0, 1, 18, 19]),
        ("ends:1/20", [0, 19]),
        ("ends:1/8", [0, 1, 2, 18, 19]),  # i < 2.5 or i >= 17.5
        ("ends:1/100", [0]),  # i < 0.2, and no i is >= 19.8
        ("ends:1/2", list(range(20))),
        ("ends:1/1", list(range(20))),
        ("first:3", [0, 1, 2]),
        ("last:5", [15, 16, 17, 18, 19]),
        ("first:20", list(range(20))),
        ("0,3,7-9", [0, 3, 7, 8, 9]),
        ("9, 3 ,3,4-4", [3, 4, 9]),
        ("full & first:6", [0, 5]),
        ("ends:1/4&full&0-19", [0, 15]),
        ("first:3&last:3", []),
        (" all ", list(range(20))),
    ],
)
def test_selects(expression: str, expected: list[int]) -> None:
    assert list(steps.select(expression, TWENTY)) == expected


@pytest.mark.parametrize("total", [1, 7, 25, 30, 100])
@pytest.mark.parametrize("part", [3, 7, 10, 20])
def test_ends_is_exact(total: int, part: int) -> None:
    chosen = steps.select(f"ends:1/{part}", CacheSchedule.uncached(total))
    assert chosen == tuple(i for i in range(total) if i * part < total or (total - i) * part <= total)


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("", "''"),
        ("everything", "'everything'"),
        ("all&", "''"),
        ("full&ends", "'ends'"),
        ("ends:1/0", "'ends:1/0'"),
        ("ends:3/2", "'ends:3/2'"),
        ("ends:0.1", "'ends:0.1'"),
        ("first:0", "'first:0'"),
        ("last:-1", "'last:-1'"),
        ("first", "'first'"),
        ("9-7", "'9-7'"),
        ("0,,3", "'0,,3'"),
        ("1-", "'1-'"),
        ("-1", "'-1'"),
        ("ALL", "'ALL'"),
        ("0 3", "'0 3'"),
    ],
)
def test_malformed(expression: str, part: str) -> None:
    with pytest.raises(PlanError) as caught:
        steps.check(expression)
    message = str(caught.value)
    assert message.startswith(f"steps {expression!r}: {part} is not a selection of steps; write ")
    assert steps.GRAMMAR in message
    assert "\n" not in message


@pytest.mark.parametrize("expression", [None, 3, ["all"], ("0", "1")])
def test_not_a_string(expression: object) -> None:
    with pytest.raises(PlanError, match="steps must be a string, got "):
        steps.check(expression)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("20", "'20' reaches step 20, but the artifact was recorded with 20 steps; allowed are 0 to 19"),
        ("0,18-25", "'0,18-25' reaches step 25"),
        (
            "full&first:21",
            "'first:21' asks for 21 steps, but the artifact was recorded with 20 steps; allowed are 1 to 20",
        ),
        ("last:21", "'last:21' asks for 21 steps"),
    ],
)
def test_beyond_the_schedule(expression: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        steps.select(expression, TWENTY)


@pytest.mark.parametrize(
    ("chosen", "text"), [((), ""), ((4,), "4"), ((0, 3, 7, 8, 9), "0,3,7-9"), ((0, 1, 5, 6), "0-1,5-6")]
)
def test_spelled(chosen: tuple[int, ...], text: str) -> None:
    assert steps.spelled(chosen) == text
    if chosen:
        assert steps.select(text, TWENTY) == chosen
