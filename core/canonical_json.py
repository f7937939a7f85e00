"""JSON with one spelling per value, so that its bytes can be compared and digested.

Keys are sorted, nothing is padded, text is UTF-8, the file ends in a newline, every number is finite.
Reading is strict in turn: what could mean two things, or is not JSON at all, is a `ValueError`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["digest", "dumps", "file_digest", "loads_strict"]


def dumps(value: Any) -> bytes:
    """Write a JSON value in its canonical spelling.

    Raises:
        ValueError: a number is not finite, a text is not valid Unicode, or the value contains itself.
        TypeError: a key is not a string, or a value has no place in JSON.
    """
    _check_keys(value)
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.encode() + b"\n"


def loads_strict(data: bytes) -> Any:
    """Read JSON, canonical or not, and refuse what another reader could take otherwise.

    Raises:
        ValueError: not JSON, not UTF-8, a duplicate key, a number that is not finite, or nested too deep.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deep to be read") from None


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical spelling of a JSON value, in hexadecimal."""
    return hashlib.sha256(dumps(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_keys(value: Any) -> None:
    """Check that every key is a string: `json` would turn the key 1 into "1", and two keys into one."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if not isinstance(item, dict | list | tuple) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise TypeError(f"key {key!r} is a {type(key).__name__}; JSON keys are strings")
            waiting.extend(item.values())
        else:
            waiting.extend(item)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        # One pass: counting each key would take hours for a hostile object of a million keys.
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return unique


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number
