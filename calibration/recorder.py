"""What a denoiser is called with, kept by a hook."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from errata.errors import CalibrationError
from errata.runtime.conditioning import flatten

__all__ = ["Recorder", "Trajectory"]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Every denoiser call of one sample-batch, on the CPU.

    Args:
        sample: (calls, rows, C, H, W), the denoiser's input as it was passed.
        timestep: (calls,), as it was passed.
        cond: the other arguments by name, each (calls, …), or (1, …) where all calls got the same values.
    """

    sample: Tensor
    timestep: Tensor
    cond: dict[str, Tensor]

    @property
    def num_calls(self) -> int:
        """How often the denoiser was called."""
        return self.sample.shape[0]

    @property
    def num_rows(self) -> int:
        """Batch rows of each call; guidance makes them a multiple of the samples."""
        return self.sample.shape[1]


class Recorder:
    """A recorder of the calls of `denoiser` inside a `with` block; the denoiser is unhooked when it ends.

    Args:
        denoiser: a module whose `forward` takes `sample` and `timestep`.
        on_call: called after each recorded call.

    Raises:
        CalibrationError: `forward` takes no such arguments; while recording, a call does not fit the ones
            before it, or carries something that is no tensor.
    """

    def __init__(self, denoiser: torch.nn.Module, *, on_call: Callable[[], object] = lambda: None) -> None:
        self._denoiser = denoiser
        self._on_call = on_call
        self._signature = inspect.signature(denoiser.forward)
        missing = [name for name in ("sample", "timestep") if name not in self._signature.parameters]
        if missing:
            raise CalibrationError(
                f"the pipeline's unet is a {type(denoiser).__name__}, whose forward takes no "
                f"`{'`, `'.join(missing)}`; a diffusers UNet takes `sample` and `timestep`"
            )
        self._samples: list[Tensor] = []
        self._timesteps: list[Tensor] = []
        self._cond: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Self:
        self._handle = self._denoiser.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def trajectory(self) -> Trajectory:
        """Return what was recorded.

        Raises:
            CalibrationError: the denoiser was never called.
        """
        if not self._samples:
            raise CalibrationError(
                f"the pipeline never called its unet ({type(self._denoiser).__name__}); is it the denoiser?"
            )
        return Trajectory(
            sample=torch.stack(self._samples),
            timestep=torch.stack(self._timesteps),
            cond={name: _stack_changes(values) for name, values in self._cond.items()},
        )

    def _record(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind(*args, **kwargs).arguments
        sample, timestep = _copy(arguments.pop("sample")), _one_timestep(arguments.pop("timestep"))
        arguments.pop("return_dict", None)
        cond = flatten(arguments)
        self._check_fits(sample, timestep, cond)
        self._samples.append(sample)
        self._timesteps.append(timestep)
        for name, value in cond.items():
            values = self._cond.setdefault(name, [])
            values.append(values[-1] if values and _same(values[-1], value) else _copy(value))
        self._on_call()

    def _check_fits(self, sample: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> None:
        """Check that a call stacks with the first one: same shapes, dtypes and arguments."""
        if not self._samples:
            return
        was = _shapes({"sample": self._samples[0], "timestep": self._timesteps[0]})
        was |= _shapes({name: values[0] for name, values in self._cond.items()})
        now = _shapes({"sample": sample, "timestep": timestep}) | _shapes(cond)
        changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if changed:
            name = changed[0]
            raise CalibrationError(
                f"UNet argument `{name}` changed within a trajectory: call 0 got {was.get(name, 'none')}, "
                f"call {len(self._samples)} got {now.get(name, 'none')}; all calls must have the same shapes "
                "(is guidance on for only some of the steps?)"
            )


def _one_timestep(timestep: Tensor | float) -> Tensor:
    """Return the timestep as a scalar tensor; pipelines pass a number, a scalar, or one equal value a row."""
    dtype = torch.float64 if isinstance(timestep, float) else None
    values = torch.as_tensor(timestep, dtype=dtype).detach().reshape(-1)
    if values.numel() == 0 or bool((values != values[0]).any()):
        raise CalibrationError(
            f"UNet argument `timestep` is {values.tolist()}; all rows of a call must share one timestep"
        )
    return _copy(values[0])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in tensors.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _same(kept: Tensor, new: Tensor) -> bool:
    return torch.equal(kept, new.detach().cpu())


def _stack_changes(values: list[Tensor]) -> Tensor:
    """Return (calls, …); or (1, …) if every call got the same values, as of a prompt's embedding."""
    constant = all(value is values[0] for value in values)
    return torch.stack(values[:1] if constant else values)
