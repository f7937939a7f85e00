"""What a command imports when it starts: what its artifact needs, and no more.

diffusers imports every optional package that it finds installed. An artifact uses few of them, and importing
the rest takes longer than making an image.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Of training and other people's weight formats; an artifact has neither.
_NEVER_USED = ("peft", "torchao")
# Pipelines that diffusers makes without transformers.
_WITHOUT_TEXT = ("DDIMPipeline", "DDPMPipeline")
# The only scheduler of diffusers 0.42 that always needs scipy; others do with this setting.
_SCIPY_SCHEDULER, _SCIPY_SETTING = "LMSDiscreteScheduler", "use_beta_sigmas"


@contextmanager
def lean_imports(artifact: Path) -> Iterator[None]:
    """Let the block import diffusers, and what builds on it, without what this artifact does not use.

    It is for a process that runs one command: until its end, diffusers takes `unused_packages` for not
    installed. After the block, others can import them. Where diffusers was imported before, nothing changes.
    """
    if "diffusers" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()  # imports make thousands of objects and leave none behind; looking takes a fifth of the time
    try:
        import torch

        unused = unused_packages(artifact)
        has_gpu = torch.cuda.is_available()
        with _hidden(unused if has_gpu else (*unused, "triton")):
            yield
        if not has_gpu:  # triton complains if its objects outlive the interpreter, as frozen ones do
            gc.freeze()  # they stay until the end: neither later collections nor the exit look at them
    finally:
        if was_enabled:
            gc.enable()


def unused_packages(artifact: Path) -> tuple[str, ...]:
    """Return the packages that diffusers would import and this artifact or engine does not use.

    The artifact has not been verified. Where it cannot be read, or says something unusual, they are fewer.
    """
    index = _object(artifact / "model_index.json")
    scheduler = _object(artifact / "scheduler" / "scheduler_config.json")
    unused = [*_NEVER_USED]
    if index.get("_class_name") in _WITHOUT_TEXT:
        unused.append("transformers")
    name = scheduler.get("_class_name", _SCIPY_SCHEDULER)
    if name != _SCIPY_SCHEDULER and not scheduler.get(_SCIPY_SETTING):
        unused.append("scipy")
    return tuple(unused)


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
            del sys.modules[name]


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
