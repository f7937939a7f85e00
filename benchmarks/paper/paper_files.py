"""Read YAML files into rows: a file that holds one row, and what row files and tables have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from paper_rows import Row

from errata.errors import ErrataError, ReportError


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file.

    Raises:
        ReportError: the file cannot be read, or holds no mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ReportError(
            f"`{path}` cannot be read as YAML: {problem}; correct the path or the file"
        ) from problem
    if not isinstance(value, dict):
        raise ReportError(f"`{path}` holds a {type(value).__name__}; it must hold keys and values")
    return value


def load_row(path: Path) -> Row:
    """Return the row of a file that holds one row, named after the file.

    The file has the fields of `Row` as keys; `base` names another file whose keys it takes over.

    Raises:
        ReportError: no such file, no mapping, or an unknown or missing key.
    """
    own = read_mapping(path)
    base = own.pop("base", None)
    shared = {} if base is None else read_mapping(path.parent / base)
    return make_row(shared, {**own, "name": path.stem}, place=f"`{path}`")


def make_row(base: Mapping[str, Any], own: Mapping[str, Any], *, place: str) -> Row:
    """Return the row with the settings of its base and its own, which win; `place` begins every error.

    Raises:
        ErrataError: an unknown or missing key, or a value that `Row` refuses.
    """
    settings = {**base, **own}
    settings["unsupported"] = {**base.get("unsupported", {}), **own.get("unsupported", {})}
    known = {field.name: field.default is field.default_factory is MISSING for field in fields(Row)}
    if unknown := sorted(settings.keys() - known):
        allowed = ", ".join(("base", *sorted(known)))
        raise ReportError(f"{place}: unknown key {unknown[0]!r}, there or in its base; allowed are {allowed}")
    if missing := [name for name, is_required in known.items() if is_required and name not in settings]:
        raise ReportError(
            f"{place} is incomplete: missing {', '.join(missing)}; add them there or in its base"
        )
    try:
        return Row(**settings)
    except ErrataError as problem:
        raise type(problem)(f"{place}: {problem}") from problem
