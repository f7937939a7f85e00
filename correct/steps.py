"""The grammar of the expressions that say where along a sampling run to correct."""

from __future__ import annotations

import re
from fractions import Fraction

from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

GRAMMAR = (
    '"all", "none", "full" (not served from the cache), "ends:1/10" (the first and the last tenth), '
    '"first:3", "last:5", "every:5" (0, 5, 10, …), "middle" (of each interval between full steps), numbers '
    'and ranges such as "0,3,7-9"; join parts with "&" for steps in all of them'
)

_COUNT = re.compile(r"(first|last):([0-9]{1,9})")
_EVERY = re.compile(r"every:([0-9]{1,9})")
_ENDS = re.compile(r"ends:([0-9]{1,9})/([0-9]{1,9})")
_NUMBERS = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(\s*,\s*[0-9]{1,9}(-[0-9]{1,9})?)*")


def check(expression: str) -> None:
    """Check what can be checked without knowing the number of steps.

    Raises:
        PlanError: it is malformed; the message has the expression, the bad part and the grammar.
    """
    if not isinstance(expression, str):
        raise PlanError(
            f"steps must be a string, got {expression!r} ({type(expression).__name__}); write {GRAMMAR}"
        )
    for part in _parts(expression):
        if not _is_wellformed(part):
            raise PlanError(f"steps {expression!r}: {part!r} is not a selection of steps; write {GRAMMAR}")


def select(expression: str, schedule: CacheSchedule) -> tuple[int, ...]:
    """Return the step indices that `expression` selects in `schedule`, sorted; there may be none.

    Raises:
        PlanError: it is malformed, or names a step that the schedule does not have.
    """
    check(expression)
    chosen = set(range(schedule.num_steps))
    for part in _parts(expression):
        chosen &= _members(part, schedule, expression)
    return tuple(sorted(chosen))


def _parts(expression: str) -> list[str]:
    return [part.strip() for part in expression.split("&")]


def _is_wellformed(part: str) -> bool:
    if part in ("all", "none", "full", "middle"):
        return True
    if match := _EVERY.fullmatch(part):
        return int(match[1]) >= 1
    if match := _COUNT.fullmatch(part):
        return int(match[2]) >= 1
    if match := _ENDS.fullmatch(part):
        return 0 < int(match[1]) <= int(match[2])
    return _NUMBERS.fullmatch(part) is not None and all(low <= high for low, high in _ranges(part))


def _members(part: str, schedule: CacheSchedule, expression: str) -> set[int]:
    total = schedule.num_steps
    if part == "all":
        return set(range(total))
    if part == "none":
        return set()
    if part == "full":
        return set(schedule.full_steps)
    if part == "middle":
        return {step for group in schedule.groups for step in middle(group, schedule)}
    if match := _EVERY.fullmatch(part):
        stride = int(match[1]) * schedule.calls_per_step
        return {step for step in range(total) if step % stride < schedule.calls_per_step}
    if match := _ENDS.fullmatch(part):
        width = Fraction(int(match[1]), int(match[2])) * total
        return {i for i in range(total) if i < width or i >= total - width}
    if match := _COUNT.fullmatch(part):
        count = int(match[2])
        if count > total:
            raise PlanError(
                f"steps {expression!r}: {part!r} asks for {count} steps, but the artifact was recorded with "
                f"{total} steps; allowed are 1 to {total}"
            )
        return set(range(count)) if match[1] == "first" else set(range(total - count, total))
    _check_within(max(high for _, high in _ranges(part)), total, part, expression)
    return {i for low, high in _ranges(part) for i in range(low, high + 1)}


def middle(group: tuple[int, int], schedule: CacheSchedule) -> range:
    """Return the denoiser calls of the middle sampling step of a group: a full step and its cached ones.

    It is empty if there are no cached ones.
    """
    start, end = group
    calls = schedule.calls_per_step
    half = start + calls * ((end - start) // calls // 2)
    return range(half, half + calls) if half > start else range(0)


def _ranges(part: str) -> list[tuple[int, int]]:
    pairs = [item.strip().partition("-") for item in part.split(",")]
    return [(int(low), int(high or low)) for low, _, high in pairs]


def _check_within(highest: int, total: int, part: str, expression: str) -> None:
    if highest >= total:
        raise PlanError(
            f"steps {expression!r}: {part!r} reaches step {highest}, but the artifact was recorded with "
            f"{total} steps; allowed are 0 to {total - 1}"
        )


def spelled(steps: tuple[int, ...]) -> str:
    """Return the steps as numbers and ranges of the grammar: `(0, 3, 7, 8, 9)` is `"0,3,7-9"`."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
