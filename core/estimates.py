"""What long work will take: time, disk and memory, as text, and the refusal of what cannot fit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errata.durations import duration
from errata.errors import ErrataError


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that there must be enough of.

    Attributes:
        what: such as `memory`.
        needed: bytes, beyond what is held already.
        available: bytes; None if the system does not say.
        way_out: what to do where it does not suffice.
    """

    what: str
    needed: int
    available: int | None
    way_out: str

    @property
    def fits(self) -> bool:
        """Whether there is enough, as far as is known."""
        return self.available is None or self.needed <= self.available


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a piece of work will take.

    Attributes:
        work: what will be done, in a few words.
        seconds: wall-clock time on this machine, from the time of a first call.
        disk_bytes: of what is written.
        memory_bytes: peak of the process's memory on its device; None if it is not known.
        call_seconds: the measured time of one call of the network.
        call_samples: samples in that call.
        needs: what must be available.
        notes: what was chosen and why, a line each.
    """

    work: str
    seconds: float
    disk_bytes: int
    memory_bytes: int | None
    call_seconds: float
    call_samples: int
    needs: Sequence[Need] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return it in a line."""
        samples = f"{self.call_samples} sample{'s' * (self.call_samples > 1)}"
        parts = [f"about {duration(self.seconds)}", f"{size_text(self.disk_bytes)} on disk"]
        if self.memory_bytes is not None:
            parts.append(f"{size_text(self.memory_bytes)} of memory at peak")
        rate = f"one call of the network with {samples} takes {_call_time(self.call_seconds)}"
        return f"{self.work}: {', '.join(parts)} ({rate})"

    def check(self, *, error: type[ErrataError]) -> None:
        """Check that it fits.

        Raises:
            ErrataError: of the given kind; it needs more memory or disk space than there is.
        """
        for need in self.needs:
            if need.available is not None and not need.fits:
                raise error(
                    f"not enough {need.what}: {self.work} needs {size_text(need.needed)} more, and "
                    f"{size_text(need.available)} are available; {need.way_out}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        value = asdict(self)
        return value | {"needs": [asdict(need) for need in self.needs], "notes": list(self.notes)}


def disk_need(out: Path, needed: int, *, way_out: str) -> Need:
    """Return the need of disk space for the directory `out`, which may not exist yet."""
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        available: int | None = shutil.disk_usage(place).free
    except OSError:
        available = None
    return Need(what=f"disk space in `{place}`", needed=needed, available=available, way_out=way_out)


def stored_size(folder: Path) -> int:
    """Return the bytes of all files below a directory; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size_text(size: float) -> str:
    """Return a number of bytes for people: `4.2 kB`, `13 MB`, `1.25 GB`."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.3g} MB" if size < 9.995e8 else f"{size / 1e9:.3g} GB"


def _call_time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
