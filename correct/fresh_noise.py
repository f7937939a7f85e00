"""Random numbers for correctors, beside those of the pipeline."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Generator, Tensor

from errata.correct.device_sync import sent


class FreshNoise:
    """Standard normal noise of one run, each image's own.

    It follows from the state that the image's generator has when the run starts (torch's own where there is
    none), from how many images before it share that generator, from the step, from the corrector's place in
    the plan, and from the number of the draw. No generator is advanced, so a run that draws nothing here is
    the run that it would have been. An image with a generator of its own gets the same noise in any batch and
    alone, whether its generator is passed bare or in a list; images that share one differ.

    Args:
        generator: what the pipeline was called with: one, one for each image, or None.
    """

    def __init__(self, generator: Any) -> None:
        given = generator if isinstance(generator, list) and generator else [generator]
        identities = [id(each) for each in given]
        self._states = [_digest(each) for each in given]
        self._earlier = [identities[:place].count(each) for place, each in enumerate(identities)]
        self._in_all = [identities.count(each) for each in identities]

    def draw(self, like: Tensor, *, step: int, place: int, draw: int) -> Tensor:
        """Noise of the shape, type and device of a batch `(B, …)`; drawn on the CPU, so alike everywhere."""
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
