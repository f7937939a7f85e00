"""How two requests differ, in the same words for every stage that continues earlier work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["differences"]

_SHOWN = 5
_DIGEST = re.compile(r"[0-9a-f]{64}")


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each entry that differs, such as `seed was 3, is now 4`.

    Both are plain JSON values. At most five entries are named, in the order of `now`, then how many
    more there are. An entry that is
    missing equals one that is None.
    """
    was, new = _leaves(recorded), _leaves(now)
    names = [name for name in {**new, **was} if was.get(name) != new.get(name)]
    found = [f"{name} was {_shown(was, name)}, is now {_shown(new, name)}" for name in names]
    return [*found[:_SHOWN], *([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the plain values of a tree by their path; a list also has its length, first."""
    branches: dict[str, Any]
    if isinstance(value, Mapping) and value:
        branches = {f"{path}.{key}" if path else str(key): item for key, item in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        branches = {f"number of {path}": len(value)}
        branches |= {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {name: leaf for at, branch in branches.items() for name, leaf in _leaves(branch, at).items()}


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    """Return a value as text; digests are shortened."""
    if name not in leaves:
        return "absent"
    text = str(leaves[name])
    return f"{text[:12]}…" if _DIGEST.fullmatch(text) else text
