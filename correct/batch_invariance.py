"""What keeps an image independent of the rest of its batch.

`FreshNoise` gives every image random numbers of its own. `BatchInvariantDenoiser` and `run_row_by_row`
evaluate image by image, so that not even the last bits depend on the batch.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from errata.correct.device_sync import sent
from errata.errors import PlanError
from errata.runtime.denoiser import Conditioning, WrappedDenoiser
from errata.runtime.schedule import StepKind


class BatchInvariantDenoiser(WrappedDenoiser):
    """A `Denoiser` that passes the rows of a batch one by one to another denoiser.

    Kernels choose their order of summation by batch size; at a batch of 1 it is always the same.
    """

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Return what `Denoiser.full` does, row by row."""
        each = [self.denoiser.full(x[row : row + 1], step, _row(cond, row, len(x))) for row in range(len(x))]
        features = [feature for _, feature in each if feature is not None]
        return torch.cat([eps for eps, _ in each]), torch.cat(features) if features else None

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """Return what `Denoiser.cached` does, row by row."""
        each = [
            self.denoiser.cached(
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
        """Return the cost of as many calls at a batch of 1."""
        return (1 if batch_size is None else batch_size) * self.denoiser.cost(kind, batch_size=1)


def run_row_by_row(pipe: Any) -> None:
    """Make text encoders, VAE and vocoder of a pipeline work row by row.

    `pipe` must be a private copy; the parts themselves stay as they are. AudioLDM 2 pads prompts to the
    longest of a batch and calls other functions of its encoders; those are left alone.
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
    """Return a shallow copy of a part whose `method` works row by row."""
    whole = getattr(part, method)
    changed = copy.copy(part)
    setattr(changed, method, row_by_row(whole))
    return changed


def row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, called once for each row, with the results joined.

    The first tensor argument tells the number of rows; other tensors with as many rows are split too.
    `function` may return tensors with one row each, or tuples or outputs of diffusers and transformers that
    hold them.
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
        "joined row by row; leave batch_invariant out"
    )


def _row(cond: Conditioning, row: int, rows: int) -> dict[str, Tensor]:
    return {name: _row_of(value, row, rows) for name, value in cond.items()}


def _row_of(value: Any, row: int, rows: int) -> Any:
    """Return one row of a batch; anything else as it is."""
    is_batch = isinstance(value, Tensor) and value.ndim and len(value) == rows
    return value[row : row + 1] if is_batch else value


class FreshNoise:
    """Standard normal noise for correctors in one run, different for every image.

    It depends on the state of the image's generator when the run starts (torch's own if there is none), on
    how many images before it share that generator, on the step, on the corrector's place in the plan, and on
    the number of the draw. No generator is advanced, so the pipeline's own noise stays the same. An image
    with a generator of its own gets the same noise in any batch, whether the generator is passed alone or in
    a list. Images that share a generator get different noise.

    Args:
        generator: that the pipeline was called with: one, one for each image, or None.
    """

    def __init__(self, generator: Any) -> None:
        given = generator if isinstance(generator, list) and generator else [generator]
        identities = [id(each) for each in given]
        self._states = [_digest(each) for each in given]
        self._earlier = [identities[:place].count(each) for place, each in enumerate(identities)]
        self._in_all = [identities.count(each) for each in identities]

    def draw(self, like: Tensor, *, step: int, place: int, draw: int) -> Tensor:
        """Return noise like a batch `(B, …)`; drawn on the CPU, so it is the same on every device."""
        drawn = f"{step}/{place}/{draw}"
        rows = [self._row(index, like.shape[1:], drawn) for index in range(like.shape[0])]
        return sent(torch.stack(rows), like)

    def _row(self, index: int, shape: torch.Size, drawn: str) -> Tensor:
        rounds, place = divmod(index, len(self._states))  # more images than generators: from the start again
        before = rounds * self._in_all[place] + self._earlier[place]
        key = f"/{before}/{drawn}" if before else f"/{drawn}"
        digest = hashlib.blake2b(self._states[place] + key.encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "big")
        return torch.randn(shape, generator=Generator().manual_seed(seed))


def _digest(generator: Generator | None) -> bytes:
    state = torch.random.get_rng_state() if generator is None else generator.get_state()
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
