"""The directory while it is being filled: which shards are finished, and how work is taken up again.

`calibration.partial.json` is rewritten after every shard and renamed to `calibration.json` after the last,
so at any moment a kill leaves either a finished set or one that says exactly what it holds.
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from errata.calibration.document import FINISHED, PARTIAL, Calls, Document, Request, differences
from errata.calibration.recorder import Trajectory
from errata.calibration.shards import FOLDER, TEMPORARY, Shard, replace_file, write_shard
from errata.directories import refusals_as
from errata.errors import CalibrationError

__all__ = ["Journal"]


class Journal:
    """Fills `out` with the shards of `request`, and keeps those that an earlier run finished.

    Raises:
        CalibrationError: `out` is finished, foreign, of another request, or cannot be written.
    """

    def __init__(self, out: Path, request: Request) -> None:
        self._out = out
        self._created = False
        with _clear_errors(out):
            document = _read_partial(out, request)
            if document is None:
                self._created = not out.exists()
                out.mkdir(parents=True, exist_ok=True)
                document = Document(request=request)
            (out / FOLDER).mkdir(exist_ok=True)
            self._request = request
            self._calls = document.calls
            self._shards = {
                index: shard for index, shard in enumerate(document.shards) if shard.is_intact(out)
            }
            if not self._shards:
                self._calls = None
            self._save()

    @property
    def calls(self) -> Calls | None:
        """What all trajectories share; None while there is no shard."""
        return self._calls

    def shard(self, index: int) -> Shard | None:
        """The finished, intact shard of that sample-batch."""
        return self._shards.get(index)

    def add(self, index: int, trajectory: Trajectory, *, num_samples: int, inputs: str | None) -> None:
        """Write the shard of a sample-batch.

        Raises:
            CalibrationError: its calls are not those of the other shards, or it cannot be written.
        """
        calls = _describe_calls(trajectory, num_samples, index)
        if self._calls is not None and calls != self._calls:
            raise CalibrationError(
                f"sample-batch {index} made other UNet calls than the ones before it "
                f"({'; '.join(differences(self._calls, calls))}); all trajectories of a set "
                "must take the same steps"
            )
        with _clear_errors(self._out):
            shard = write_shard(self._out, index, trajectory, num_samples=num_samples, inputs=inputs)
            self._calls = calls
            self._shards[index] = shard
            self._save()

    def finish(self) -> None:
        """Declare the set complete."""
        with _clear_errors(self._out):
            (self._out / PARTIAL).replace(self._out / FINISHED)

    def abandon_if_empty(self) -> None:
        """Leave no trace of a run that failed before its first shard."""
        if self._shards:
            return
        shutil.rmtree(self._out / FOLDER, ignore_errors=True)
        (self._out / PARTIAL).unlink(missing_ok=True)
        (self._out / (PARTIAL + TEMPORARY)).unlink(missing_ok=True)
        if self._created and self._out.is_dir():
            self._out.rmdir()

    def _save(self) -> None:
        # Resumed work can have a gap, where a shard was damaged; what follows it counts once it is closed.
        finished: list[Shard] = []
        while (index := len(finished)) in self._shards:
            finished.append(self._shards[index])
        document = Document(
            request=self._request, calls=self._calls if finished else None, shards=tuple(finished)
        )
        replace_file(self._out / PARTIAL, document.to_bytes())


def _read_partial(out: Path, request: Request) -> Document | None:
    """What an earlier run left in `out`; None where there is room for a new set."""
    if out.exists() and not out.is_dir():
        raise CalibrationError(f"`{out}` exists and is not a directory; choose another one")
    if (out / FINISHED).exists():
        raise CalibrationError(
            f"`{out}` holds a finished calibration; use it with `errata compress` or "
            "errata.calibration.load, or choose another directory"
        )
    if not (out / PARTIAL).exists():
        if out.exists() and any(path.name != PARTIAL + TEMPORARY for path in out.iterdir()):
            raise CalibrationError(
                f"`{out}` is not empty and holds no calibration; choose another directory or empty it"
            )
        return None
    document = Document.read(out / PARTIAL)
    if found := differences(document.request, request):
        raise CalibrationError(
            f"`{out}` holds the unfinished calibration of another request ({'; '.join(found)}); ask for the "
            "same again, or choose another directory"
        )
    return document


def _describe_calls(trajectory: Trajectory, num_samples: int, index: int) -> Calls:
    rows_per_sample, odd_rows = divmod(trajectory.num_rows, num_samples)
    if odd_rows or not rows_per_sample:
        raise CalibrationError(
            f"the UNet got {trajectory.num_rows} rows for sample-batch {index} of {num_samples} samples; the "
            f"pipeline arguments of a sample-batch must describe exactly {num_samples}"
        )
    return Calls(
        timesteps=tuple(trajectory.timestep.tolist()),
        timestep_dtype=str(trajectory.timestep.dtype).removeprefix("torch."),
        rows_per_sample=rows_per_sample,
        sample_shape=tuple(trajectory.sample.shape[2:]),
        sample_dtype=str(trajectory.sample.dtype).removeprefix("torch."),
        cond=tuple(sorted(trajectory.cond)),
    )


def _clear_errors(out: Path) -> AbstractContextManager[None]:
    return refusals_as(
        CalibrationError,
        doing=f"write a calibration to `{out}`",
        advice="choose a directory that can be written",
    )
