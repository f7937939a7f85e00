"""Time calls in turn, round by round, so that a drift in the machine's speed affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]
WARM_UP_ROUNDS = 2


def interleaved_seconds(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    warm_up: int = WARM_UP_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round, by name; warm-up rounds come first and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = clock()
            call()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds
