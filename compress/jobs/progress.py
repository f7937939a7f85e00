"""What a long compression tells while it runs."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from errata.durations import duration, time_left
from errata.journal import Make, Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One reconstructed or corrected block.

    Attributes:
        name: module name of the block.
        index: its position among `total` blocks, from 0.
        total: number of blocks.
        loss_before: mean squared error of the block's output with its initial codes, ranges and biases.
        loss_after: the same with the learned or corrected ones.
        seconds: what it took; of the earlier run, if it was taken from there.
        is_resumed: whether an earlier run had finished it.
        phase: which part of the compression it belongs to, such as `learned rounding`.
    """

    name: str
    index: int
    total: int
    loss_before: float
    loss_after: float
    seconds: float
    is_resumed: bool
    phase: str = ""


BlockListener = Callable[[BlockReport], None]


class BlockProgress:
    """A log of one phase's blocks with their losses and the time that is left; passes them on.

    Give `stage` and `report` to what works block by block.
    """

    def __init__(self, phase: str, stage: Stage, listener: BlockListener | None) -> None:
        self._phase = phase
        self._stage = stage
        self._listener = listener
        self._resumed = 0
        self._total = 0
        self._seconds: list[float] = []

    def stage(self, name: str, make: Make) -> dict[str, Tensor]:
        """Run the wrapped stage; before the first one that has to be computed, say how many were done."""

        def announced() -> dict[str, Tensor]:
            self._tell_resumed()
            return dict(make())

        return self._stage(name, announced)

    def report(self, block: BlockReport) -> None:
        """Take the report of a block, in their order."""
        self._total = block.total
        self._seconds.append(block.seconds)
        self._resumed += block.is_resumed
        if block.is_resumed and block.index + 1 == block.total:
            self._tell_resumed()
        elif not block.is_resumed:
            _log.info("%s", self._line(block))
        if self._listener is not None:
            self._listener(dataclasses.replace(block, phase=self._phase))

    def _tell_resumed(self) -> None:
        if self._resumed:
            _log.info("resuming: %d of %d blocks are done (%s)", self._resumed, self._total, self._phase)
            self._resumed = 0

    def _line(self, block: BlockReport) -> str:
        ahead = block.total - block.index - 1
        left = f"; {time_left(len(self._seconds), ahead, sum(self._seconds))}" if ahead else ""
        return (
            f"{self._phase}: block {block.index + 1} of {block.total}, {block.name}: loss "
            f"{block.loss_before:.3g} before, {block.loss_after:.3g} after, {duration(block.seconds)}{left}"
        )


class StepProgress:
    """A log of how many steps are done, now and then, where no progress bar can be seen."""

    def __init__(self, phase: str, total: int, *, every: float = 20.0) -> None:
        self._phase = phase
        self._total = total
        self._every = every
        self._start = self._told = time.monotonic()
        self._made = 0

    def update(self, done: int, *, is_resumed: bool) -> None:
        """Say that `done` steps are done in all; the latest was taken from an earlier run or not."""
        now = time.monotonic()
        if is_resumed:
            self._start = now
            return
        self._made += 1
        if now - self._told >= self._every and done < self._total:
            self._told = now
            left = time_left(self._made, self._total - done, now - self._start)
            _log.info("%s: %d of %d steps; %s", self._phase, done, self._total, left)
