"""Which batches a process makes: all of them, or its share among processes and independent jobs.

Whole batches are shared: a batch has the same contents whichever process makes it, so what comes out in the
end does not depend on how many processes there were.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

from errata.errors import ErrataError

__all__ = ["Shard", "Workers"]

# Processes wait for each other at the end of a run, which may take days.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Shard:
    """Share number `index`, from 0, of `count` independent jobs.

    Raises:
        ErrataError: of the kind `error`; the numbers do not fit.
    """

    error: ClassVar[type[ErrataError]] = ErrataError

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise self.error(
                f"shard {self.index}/{self.count}: write I/N with I from 0 to N - 1, such as 3/16"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `3/16`.

        Raises:
            ErrataError: of the kind `error`; the text has another form.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found:
            raise cls.error(f"shard `{text}`: write I/N with I from 0 to N - 1, such as 3/16")
        return cls(int(found.group(1)), int(found.group(2)))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def launched_processes() -> int:
    """Return how many processes `accelerate launch` or `torchrun` started for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Workers:
    """The processes of one job that `accelerate launch` or `torchrun` started; otherwise this one alone.

    Raises:
        ErrataError: of the kind `error`; there are several, and accelerate is not installed.
    """

    error: ClassVar[type[ErrataError]] = ErrataError

    def __init__(self, *, on_cpu: bool) -> None:
        self._state: Any = None
        if launched_processes() > 1:
            try:
                from accelerate import PartialState
            except ImportError as problem:
                raise self.error(
                    "several processes need accelerate; run `pip install errata[report]`"
                ) from problem
            self._state = PartialState(cpu=on_cpu, timeout=_PATIENCE)

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._state is None else int(self._state.process_index)

    @property
    def count(self) -> int:
        """Number of processes."""
        return 1 if self._state is None else int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process does what must be done once."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def batches(self, shard: Shard, total: int) -> Sequence[int]:
        """Return the numbers of the batches of this process, out of `total`."""
        return range(shard.index * self.count + self.index, total, shard.count * self.count)
