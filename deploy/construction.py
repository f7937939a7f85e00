"""Networks made from an artifact's settings alone: shapes without memory, of a bounded size."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from errata.deploy.limits import LARGEST_SAMPLE, LARGEST_STRIDE, MOST_MODULES
from errata.errors import ArtifactCorruptError


@contextmanager
def without_memory() -> Iterator[None]:
    """Make networks in this block on the meta device, and stop before one grows without end.

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


def check_geometry(file: Path, network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Check what no weight's shape shows: strides, paddings and dilations, and the image size.

    Raises:
        ArtifactCorruptError: naming the settings' file and the layer.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            for word, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
                value = getattr(module, word)
                if not _are_whole(value, least, LARGEST_STRIDE) or len(value) != 2:
                    raise ArtifactCorruptError(
                        f"{file} gives layer {name!r} the {word} {str(value)[:80]}; allowed are pairs of "
                        f"whole numbers from {least} to {LARGEST_STRIDE}"
                    )
    size = settings.get("sample_size")
    sides = size if isinstance(size, list) else [size]
    if size is not None and not (_are_whole(sides, 1, LARGEST_SAMPLE) and 1 <= len(sides) <= 2):
        raise ArtifactCorruptError(
            f"{file} has sample_size={str(size)[:80]}; allowed are whole numbers from 1 to {LARGEST_SAMPLE:,}"
        )


def _are_whole(values: Any, least: int, most: int) -> bool:
    return isinstance(values, list | tuple) and all(
        type(item) is int and least <= item <= most for item in values
    )
