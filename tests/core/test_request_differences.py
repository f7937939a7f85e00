"""What differs between two requests, in words."""

from errata.request_differences import differences


def test_equal_requests_do_not_differ() -> None:
    request = {"seed": 1, "recipe": {"bits": 4, "steps": [0, 4]}, "nothing": None}
    assert differences(request, {"seed": 1, "recipe": {"bits": 4, "steps": [0, 4]}}) == []


def test_entries_are_named_by_their_path_with_both_values() -> None:
    was = {"seed": 3, "recipe": {"bits": 8, "steps": [0, 4]}, "model": "a" * 64}
    now = {"seed": 4, "recipe": {"bits": 8, "steps": [0, 5]}, "model": "b" * 64, "device": "cpu"}
    assert differences(was, now) == [
        "seed was 3, is now 4",
        "recipe.steps[1] was 4, is now 5",
        "model was aaaaaaaaaaaa…, is now bbbbbbbbbbbb…",
        "device was absent, is now cpu",
    ]
    assert differences({"steps": [0]}, {"steps": [0, 9]}) == [
        "number of steps was 1, is now 2",
        "steps[1] was absent, is now 9",
    ]


def test_many_differences_are_counted() -> None:
    was, now = ({f"k{index}": value for index in range(8)} for value in (0, 1))
    assert differences(was, now) == [*(f"k{index} was 0, is now 1" for index in range(5)), "and 3 more"]
