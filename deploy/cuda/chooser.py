"""The fastest of several ways to compute a layer at a shape: measured once, then remembered."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from errata.deploy.cuda.store import Key, TimesStore
from errata.deploy.cuda.timing import Timer
from errata.errors import ArtifactError

# Rounds in which every candidate runs once, in turn, so that a drift of the clock rate cancels.
_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        name: of the fastest candidate.
        seconds: what each that ran took.
        failures: what each said that did not run.
    """

    name: str
    seconds: Mapping[str, float]
    failures: Mapping[str, str]

    def describe(self) -> str:
        """Return the times in milliseconds, fastest first, then failures."""
        ranked = sorted(self.seconds.items(), key=lambda item: item[1])
        texts = [f"{name} {1000 * seconds:.4g} ms" for name, seconds in ranked]
        return ", ".join([*texts, *(f"{name} failed: {why}" for name, why in self.failures.items())])


class Chooser:
    """A timer of candidates, which remembers the times in a store.

    Args:
        timer: how a call is timed.
        store: where times are kept between processes; None keeps none.
    """

    def __init__(self, timer: Timer, store: TimesStore | None) -> None:
        self._timer = timer
        self._store = store

    def choose(self, key: Key, calls: Mapping[str, Callable[[], object]]) -> Choice:
        """Return the fastest of `calls`.

        A candidate that the device or the compiler refuses (a tile that needs more shared memory than there
        is, for instance) is out, and said to be. Nothing is then stored: the next process tries again.

        Raises:
            ArtifactError: none of them runs.
        """
        stored = None if self._store is None else self._store.read(key, tuple(calls))
        if stored is not None:
            return Choice(name=_fastest(stored), seconds=stored, failures={})
        seconds, failures = self._measure(calls)
        if not seconds:
            reasons = "; ".join(f"{name}: {why}" for name, why in failures.items())
            raise ArtifactError(f"no kernel runs {dict(key)}: {reasons}; use backend='reference'")
        if self._store is not None and not failures:
            self._store.write(key, seconds)
        return Choice(name=_fastest(seconds), seconds=seconds, failures=failures)

    def _measure(self, calls: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, str]]:
        ready: dict[str, Callable[[], float]] = {}
        failures: dict[str, str] = {}
        for name, call in calls.items():
            try:
                ready[name] = self._timer.prepare(call)
            except Exception as error:
                if not _is_of_the_device(error):
                    raise
                failures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(_ROUNDS):
            for name, measure in ready.items():
                times[name].append(measure())
        return {name: statistics.median(values) for name, values in times.items()}, failures


def _is_of_the_device(error: Exception) -> bool:
    # Triton's errors have no base class but Exception's; its module may not be there to name them.
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("triton.")


def _fastest(seconds: Mapping[str, float]) -> str:
    return min(seconds, key=lambda name: seconds[name])
