"""Forward passes that are watched, and that end where the rest is of no use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class _ReachedError(Exception):
    """The end of a forward pass whose rest is not needed."""


def call_order(unet: nn.Module, names: Iterable[str], run: Callable[[], object]) -> list[str]:
    """Return those of the named modules that `run()` calls, in the order of their first calls."""
    order: dict[str, None] = {}
    with ExitStack() as cleanup:
        for name in names:

            def hook(*_: object, name: str = name) -> None:
                order.setdefault(name)

            cleanup.enter_context(_removing(unet.get_submodule(name).register_forward_pre_hook(hook)))
        run()
    return list(order)


def input_of(module: nn.Module, run: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that `module` gets during `run()`, which ends there.

    Raises:
        RuntimeError: `run` never calls the module.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _ReachedError

    with _removing(module.register_forward_pre_hook(hook, with_kwargs=True)):
        _run_until_reached(run)
    return seen[0]


def output_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what `module` returns during `run()`, which ends there.

    Raises:
        RuntimeError: `run` never calls the module.
        TypeError: it returns anything but a tensor.
    """
    seen: list[Any] = []

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise _ReachedError

    with _removing(module.register_forward_hook(hook)):
        _run_until_reached(run)
    if not isinstance(seen[0], Tensor):
        raise TypeError(f"a {type(module).__name__} returns a {type(seen[0]).__name__}; a tensor is expected")
    return seen[0]


def _run_until_reached(run: Callable[[], object]) -> None:
    try:
        run()
    except _ReachedError:
        return
    raise RuntimeError("the forward pass ended without calling the block")


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
