"""An accelerator that does not exist: tensors that say they are on one, and a count of who waits for it.

`OnDevice` holds its values in main memory and reports a device that this build has no kernels for.
`Accelerator` computes what is asked of such tensors, notes everything for which a program would have to wait
for a real one (a value that is read, a result whose shape depends on values, a copy that blocks), and refuses
what a real one refuses: operands on two devices, but for a scalar in main memory.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy")
CPU = torch.device("cpu")
aten: Any = torch.ops.aten

READS = {aten._local_scalar_dense.default, aten.equal.default}
VALUES_DECIDE_SHAPES = {
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}


class OnDevice(Tensor):
    """`held` has the values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} after the accelerator was taken away")

    def tolist(self) -> Any:
        """What torch does for no subclass: copies, which is noted, and reads."""
        return self.cpu().tolist()


class Accelerator(TorchDispatchMode):
    """`waits[i]` has who waited in phase i, as `file:line operation`; `next_phase` begins another one."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[list[str]] = [[]]

    def next_phase(self) -> None:
        self.waits.append([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_here = [isinstance(each, OnDevice) for each in given]
        if not any(is_here) and asked != DEVICE:
            return func(*args, **kwargs)
        if self._makes_wait(func, args, kwargs, given):
            self.waits[-1].append(f"{_culprit()} {func}")
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        if not is_copy and any(each.ndim and not here for each, here in zip(given, is_here, strict=True)):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if asked is not None:
            kwargs["device"] = CPU
        plain_args, plain_kwargs = tree_map_only(OnDevice, lambda each: each.held, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable:
            return args[0]
        # A scalar that is read is a number here, and no tensor.
        return result if asked == CPU else tree_map_only(Tensor, OnDevice, result)

    def _makes_wait(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> bool:
        if func in READS | VALUES_DECIDE_SHAPES:
            return True
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            is_sent = kwargs["device"] == DEVICE
            return is_sent != isinstance(args[0], OnDevice) and not (is_sent and kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return False


def to_device(values: Tensor) -> Tensor:
    """A tensor on the pretended device."""
    return OnDevice(values)


@contextmanager
def accelerator() -> Iterator[Accelerator]:
    """The device, for the body."""
    with Accelerator() as mode:
        yield mode


def _culprit() -> str:
    """The innermost line of the library, or of diffusers, that is being executed."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}"
