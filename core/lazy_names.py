"""Public names of a package, each imported when it is first asked for (PEP 562).

    if TYPE_CHECKING:
        from errata.deploy.loading import load, verify
    __all__ = ["load", "verify"]
    __getattr__, __dir__ = lazy_names(__name__, {"errata.deploy.loading": ("load", "verify")})

So `errata verify` imports what it needs, and neither torch nor diffusers. Type checkers and editors read the
imports under `TYPE_CHECKING`; a test compares them with the table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, places: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose public names are in other modules.

    Args:
        package: its name, `__name__` where it is used.
        places: the names by the module that defines them.
    """
    homes = {name: module for module, names in places.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, found)  # so that it is asked for once
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
