from collections.abc import Callable
from pathlib import Path

import pytest

from errata.deploy.cuda.chooser import Chooser
from errata.deploy.cuda.store import TimesStore
from errata.errors import ArtifactError

KEY = {"device": "Some GPU"}


class FakeTimer:
    """A clock that calls move on by themselves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def call(self, name: str, *seconds: float) -> Callable[[], object]:
        """Takes each of these seconds in turn, over and over."""

        def run() -> None:
            self.now += seconds[self.order.count(name) % len(seconds)]
            self.order.append(name)

        return run

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        def measured() -> float:
            start = self.now
            call()
            return self.now - start

        return measured


def test_the_fastest_is_chosen_by_the_median_of_interleaved_rounds() -> None:
    timer = FakeTimer()
    # The mean of "spiky" is larger, its median smaller.
    calls = {"steady": timer.call("steady", 2e-3), "spiky": timer.call("spiky", 1e-3, 1e-3, 9e-3)}
    choice = Chooser(timer, None).choose(KEY, calls)
    assert choice.name == "spiky"
    assert choice.seconds == pytest.approx({"steady": 2e-3, "spiky": 1e-3})
    assert timer.order == ["steady", "spiky"] * 7
    assert choice.describe() == "spiky 1 ms, steady 2 ms"


def test_stored_times_are_taken_and_nothing_runs(tmp_path: Path) -> None:
    timer, store = FakeTimer(), TimesStore(tmp_path)
    calls = {"a": timer.call("a", 2.0), "b": timer.call("b", 1.0)}
    first = Chooser(timer, store).choose(KEY, calls)
    timer.order.clear()
    assert Chooser(timer, TimesStore(tmp_path)).choose(KEY, calls) == first
    assert timer.order == []
    assert Chooser(timer, store).choose({"device": "Another"}, calls).name == "b"
    assert timer.order


class RefusingTimer(FakeTimer):
    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        return super().prepare(call)


def fails() -> None:
    raise RuntimeError("out of resource: shared memory\nmore text")


def test_what_does_not_run_is_out_and_said_to_be(tmp_path: Path) -> None:
    timer, store = RefusingTimer(), TimesStore(tmp_path)
    choice = Chooser(timer, store).choose(KEY, {"large": fails, "small": timer.call("small", 1.0)})
    assert choice.name == "small"
    assert choice.describe() == "small 1000 ms, large failed: RuntimeError: out of resource: shared memory"
    assert store.read(KEY, ("large", "small")) is None  # the next process tries again
    with pytest.raises(ArtifactError, match="no kernel runs .*large: RuntimeError.*use backend='reference'"):
        Chooser(timer, store).choose(KEY, {"large": fails})
