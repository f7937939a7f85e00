"""Networks made from an artifact's settings alone: shapes without memory, and no more than a network has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from errata.deploy.limits import MOST_MODULES


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks made in this block are on the meta device, and making one may not go on without end.

    A setting such as a billion layers costs a line to write. Whatever it is called, it shows as modules.

    Raises:
        ValueError: in the block, once they have more than `MOST_MODULES` modules and parameters together.
    """
    thread, count = threading.get_ident(), 0

    def tally(_module: Any, _name: str, _registered: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:  # hooks are for the whole process
            return
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES:,} modules and parameters")

    hooks = (
        register_module_module_registration_hook(tally),
        register_module_parameter_registration_hook(tally),
    )
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
