"""What a command imports when it starts: what its artifact needs, and no more.

diffusers imports every optional package that it finds installed. An artifact uses few of them, and importing
the rest takes longer than making an image.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Of training and other people's weight formats; an artifact has neither.
_NEVER_USED = ("peft", "torchao")
# Of text, and of schedulers with other betas; a known composition has neither.
_UNUSED_BY_KNOWN = ("scipy", "transformers")


@contextmanager
def lean_imports(
    args: argparse.Namespace, artifact: Path | None, *, runs_kernels: bool = True
) -> Iterator[None]:
    """Let the block import diffusers, and what builds on it, without what an artifact does not use.

    Without an artifact nothing makes a pipeline; without `runs_kernels` nothing runs on a GPU. Until the
    process ends, diffusers takes `unused_packages` for not installed; after the block, others can import
    them. So this does nothing in a process that is not the command's own, or has diffusers already.
    """
    if not args.has_own_process or "diffusers" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()  # imports make thousands of objects and leave none behind; looking takes a fifth of the time
    try:
        unused = unused_packages(artifact)
        has_kernels = runs_kernels and _has_gpu()
        with _hidden(unused if has_kernels else (*unused, "triton")):
            yield
        if not has_kernels:  # triton complains if its objects outlive the interpreter, as frozen ones do
            gc.freeze()  # they stay until the end: neither later collections nor the exit look at them
    finally:
        if was_enabled:
            gc.enable()


def unused_packages(artifact: Path | None) -> tuple[str, ...]:
    """Return the packages that diffusers would import and this artifact or engine does not use.

    The artifact has not been verified. Where it cannot be read, or says something unusual, they are fewer.
    """
    from errata.deploy.known_composition import KNOWN_PIPELINES, is_known_scheduler

    if artifact is None:
        return (*_NEVER_USED, *_UNUSED_BY_KNOWN)
    index = _object(artifact / "model_index.json")
    scheduler = _object(artifact / "scheduler" / "scheduler_config.json")
    is_known = index.get("_class_name") in KNOWN_PIPELINES and is_known_scheduler(scheduler)
    return (*_NEVER_USED, *_UNUSED_BY_KNOWN) if is_known else _NEVER_USED


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let imports of these packages fail as if they were not installed, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    # None in `sys.modules` is Python's own way to say so, also to `importlib.util.find_spec`.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
