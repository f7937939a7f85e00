"""Evaluation image by image, so that no image's bits depend on its neighbours in the batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.errors import PlanError
from errata.runtime.denoiser import Conditioning, Denoiser
from errata.runtime.schedule import CacheSchedule, StepKind


class SampleWise:
    """A `Denoiser` that evaluates the rows of a batch one by one, with another.

    Kernels choose their order of summation by the size of the batch; at a batch of 1 it is always the same.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    @property
    def schedule(self) -> CacheSchedule:
        """See `Denoiser.schedule`."""
        return self._denoiser.schedule

    @property
    def timesteps(self) -> tuple[float, ...]:
        """See `Denoiser.timesteps`."""
        return self._denoiser.timesteps

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        each = [self._denoiser.full(x[row : row + 1], step, _row(cond, row, len(x))) for row in range(len(x))]
        features = [feature for _, feature in each if feature is not None]
        return torch.cat([eps for eps, _ in each]), torch.cat(features) if features else None

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`."""
        each = [
            self._denoiser.cached(
                x[row : row + 1],
                step,
                _row(cond, row, len(x)),
                feature[row : row + 1],
                is_extrapolated=is_extrapolated,
            )
            for row in range(len(x))
        ]
        return torch.cat(each)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """See `Denoiser.cost`: so many calls at a batch of 1."""
        return (1 if batch_size is None else batch_size) * self._denoiser.cost(kind, batch_size=1)


def works_one_by_one(pipe: Any) -> None:
    """Lets text encoders, VAE and vocoder of this pipeline work on one row of a batch after the other.

    `pipe` must be a private copy; the parts themselves stay as they are. AudioLDM 2 pads prompts to the
    longest of a batch, and conditions are made by other functions of its encoders; these are left alone.
    """
    for name in ("text_encoder", "text_encoder_2", "vocoder"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, _with(getattr(pipe, name), "forward"))
    vae = getattr(pipe, "vae", None)
    if hasattr(vae, "use_slicing"):
        pipe.vae = copy.copy(vae)
        pipe.vae.use_slicing = True
    elif vae is not None:
        pipe.vae = _with(vae, "decode")


def _with(part: Any, method: str) -> Any:
    """A shallow copy of a part whose `method` works row by row."""
    whole = getattr(part, method)
    changed = copy.copy(part)
    setattr(changed, method, row_by_row(whole))
    return changed


def row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one row after the other.

    Rows are those of the first tensor argument; other tensors with as many are split alike. What `function`
    returns may be tensors with a row for each, or tuples or outputs of diffusers and transformers that hold
    them.
    """

    @functools.wraps(function)
    def each(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        rows = len(tensors[0]) if tensors else 1
        if rows == 1:
            return function(*args, **kwargs)

        return _joined(
            [
                function(
                    *(_row_of(value, row, rows) for value in args),
                    **{name: _row_of(value, row, rows) for name, value in kwargs.items()},
                )
                for row in range(rows)
            ]
        )

    return each


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.ndim else torch.stack(list(outputs)).mean()
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    if isinstance(first, Mapping):  # diffusers' BaseOutput, transformers' ModelOutput
        kind: Any = type(first)
        return kind(**{name: _joined([output[name] for output in outputs]) for name in first})
    raise PlanError(
        f"batch_invariant=True: a part of the pipeline returned a {type(first).__name__}, which cannot be "
        "made row by row; leave batch_invariant out"
    )


def _row(cond: Conditioning, row: int, rows: int) -> dict[str, Tensor]:
    return {name: _row_of(value, row, rows) for name, value in cond.items()}


def _row_of(value: Any, row: int, rows: int) -> Any:
    """A row of what has one for each image; everything else as it is."""
    is_batch = isinstance(value, Tensor) and value.ndim and len(value) == rows
    return value[row : row + 1] if is_batch else value
