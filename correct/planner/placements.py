"""Where along a run to spend what the budget allows.

A unit is what is corrected at one price: the denoiser calls of a sampler step, or of a cache interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from errata.correct.steps import spelled
from errata.runtime.schedule import CacheSchedule

Unit = tuple[int, ...]


def sampler_steps(calls: Sequence[int], schedule: CacheSchedule) -> list[Unit]:
    """Denoiser calls, sorted, as sampler steps."""
    return _grouped(calls, lambda call: call // schedule.calls_per_step)


def intervals(calls: Sequence[int], schedule: CacheSchedule) -> list[Unit]:
    """Cached denoiser calls, sorted, by the full step whose feature they reuse."""
    full = [call for call in schedule.full_steps if call % schedule.calls_per_step == 0]
    return _grouped(calls, lambda call: sum(start <= call for start in full))


def placements(units: Sequence[Unit], affordable: int) -> dict[str, str]:
    """Steps expressions by name, each for as many units as are affordable; no two are the same."""
    if affordable >= len(units):
        return {"all": "all"} if units else {}
    if affordable < 1:
        return {}
    count, total = affordable, len(units)
    chosen = {
        f"first {count}": range(count),
        f"last {count}": range(total - count, total),
        f"ends {count}": [*range((count + 1) // 2), *range(total - count // 2, total)],
        f"spread {count}": [(2 * index + 1) * total // (2 * count) for index in range(count)],
    }
    named: dict[str, str] = {}
    for name, indices in chosen.items():
        expression = spelled(tuple(sorted(chain.from_iterable(units[index] for index in indices))))
        if expression not in named.values():
            named[name] = expression
    return named


def _grouped(calls: Sequence[int], group: Callable[[int], int]) -> list[Unit]:
    units: dict[int, list[int]] = {}
    for call in calls:
        units.setdefault(group(call), []).append(call)
    return [tuple(unit) for unit in units.values()]
