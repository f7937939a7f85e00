"""Random numbers for correctors, beside those of the pipeline."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Generator, Tensor


class FreshNoise:
    """Standard normal noise of one run, each image's own.

    It follows from the state that the image's generator has when the run starts (from the image's place in
    the batch too, where images share a generator, or there is none and torch's own stands for it), from the
    step, from the corrector's place in the plan, and from the number of the draw. No generator is advanced,
    so a run that draws nothing here is the run that it would have been; and an image with a generator of its
    own gets the same noise in any batch.

    Args:
        generator: what the pipeline was called with: one, one for each image, or None.
    """

    def __init__(self, generator: Any) -> None:
        self._states = [_digest(each) for each in generator] if isinstance(generator, list) else None
        self._shared = b"" if self._states is not None else _digest(generator)

    def draw(self, like: Tensor, *, step: int, place: int, draw: int) -> Tensor:
        """Noise of the shape, type and device of a batch `(B, …)`; drawn on the CPU, so alike everywhere."""
        drawn = f"{step}/{place}/{draw}"
        rows = [self._row(index, like.shape[1:], drawn) for index in range(like.shape[0])]
        return torch.stack(rows).to(like.device, like.dtype)

    def _row(self, index: int, shape: torch.Size, drawn: str) -> Tensor:
        if self._states is not None and index < len(self._states):
            key = self._states[index] + f"/{drawn}".encode()
        else:
            key = self._shared + f"/{index}/{drawn}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        return torch.randn(shape, generator=Generator().manual_seed(seed))


def _digest(generator: Generator | None) -> bytes:
    state = torch.random.get_rng_state() if generator is None else generator.get_state()
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
