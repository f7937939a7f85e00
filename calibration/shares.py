"""Shares of a calibration set: what several processes record, in one directory or in one each.

    calibration.shared.json     the request and the prompts
    shards/00003.safetensors    one sample-batch, as in the finished set
    records/00003.json          what `calibration.json` will say of it, who recorded it, its plain arguments

A record is written after its shard. No process writes what another one needs, so directories add up: those of
several machines may be copied into one, or given to `errata.calibration.merge` together.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from errata import canonical_json, sharding
from errata.calibration.arguments import as_plain
from errata.calibration.document import PARTIAL, Calls, Request, check_is_open, write_fitting
from errata.calibration.entries import build, check_keys
from errata.calibration.given import Given
from errata.calibration.recorder import Trajectory
from errata.calibration.shards import FOLDER, shard_name
from errata.calibration.shards import Shard as ShardFile
from errata.directories import refusals_as, write_whole
from errata.errors import CalibrationError
from errata.journal import Journal
from errata.journal_rules import JournalRules

__all__ = ["RECORDS", "RULES", "Shard", "ShardRecord", "ShareRecording", "Workers", "holds_shares"]

RECORDS = "records"
RULES = JournalRules(
    work="shares of a calibration",
    format="errata-calibration-shares/1",
    error=CalibrationError,
    request="calibration.shared.json",
    lock=".lock",
    items=FOLDER,
    logger="errata.calibration",
    is_shared=True,
)
_ADVICE = "free some space, or choose another directory"
_log = logging.getLogger(RULES.logger)


class Shard(sharding.Shard):
    """Share number `index`, from 0, of `count` independent jobs that record one calibration set.

    Raises:
        CalibrationError: the numbers do not fit.
    """

    error = CalibrationError


class Workers(sharding.Workers):
    """The processes that record one calibration set.

    Raises:
        CalibrationError: there are several, and accelerate is not installed.
    """

    error = CalibrationError


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is known of one recorded sample-batch.

    Attributes:
        share: the share that it was recorded for, such as `3/16`.
        shard: its entry in `calibration.json`.
        calls: the denoiser calls that it shows.
        inputs: its pipeline arguments; None if JSON cannot hold them, or there are none.
    """

    share: str
    shard: ShardFile
    calls: Calls
    inputs: dict[str, Any] | None

    def write(self, root: Path, index: int) -> None:
        """Write the record of sample-batch `index`, whole or not at all.

        Raises:
            CalibrationError: it cannot be written.
        """
        with refusals_as(CalibrationError, doing=f"write to `{root}`", advice=_ADVICE):
            (root / RECORDS).mkdir(exist_ok=True)
        data = canonical_json.dumps(dataclasses.asdict(self))
        write_whole(record_file(root, index), data, error=CalibrationError, advice=_ADVICE)

    @classmethod
    def read(cls, root: Path, index: int) -> Self | None:
        """Return the record of sample-batch `index`; None if there is none.

        Raises:
            CalibrationError: it is damaged.
        """
        file = record_file(root, index)
        try:
            return cls._of(canonical_json.loads_strict(file.read_bytes()), index)
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as problem:
            raise CalibrationError(
                f"`{file}` is damaged: {problem}; run the `errata calibrate --shard` that wrote it again"
            ) from problem

    @classmethod
    def _of(cls, content: Any, index: int) -> Self:
        check_keys(content, {field.name for field in dataclasses.fields(cls)}, "it")
        shard = build(ShardFile, content["shard"], "the shard")
        if shard.file != shard_name(index):
            raise ValueError(f"it describes {shard.file}")
        return cls(
            share=str(content["share"]),
            shard=shard,
            calls=build(Calls, content["calls"], "calls"),
            inputs=None if content["inputs"] is None else dict(content["inputs"]),
        )


def record_file(root: Path, index: int) -> Path:
    """Return the place of the record of sample-batch `index`."""
    return root / RECORDS / f"{index:05d}.json"


def holds_shares(path: Path) -> bool:
    """Return whether a directory holds shares of a calibration set."""
    return (path / RULES.request).is_file()


class ShareRecording:
    """A share of a calibration set while it is being recorded; a context manager.

    Several processes may record into `out` at the same time, each its own sample-batches.

    Args:
        out: the directory of this share, or of several.
        request: of the whole set.
        prompts: one for each sample of the whole set.
        share: the name of the share.

    Raises:
        CalibrationError: `out` holds a finished calibration, one that a single process began, other files or
            another request, or it cannot be written.
    """

    def __init__(
        self, out: Path, request: Request, prompts: list[str] | None, *, share: sharding.Shard
    ) -> None:
        self._out = out
        self._share = share
        self._size = len(request.batch_sizes())
        rules = dataclasses.replace(RULES, notes={"prompts": prompts})
        plain = dataclasses.asdict(request)
        self._journal = Journal(out, plain, rules, check_place=self._check_place)

    def __enter__(self) -> Self:
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    @property
    def calls(self) -> Calls | None:
        """What all trajectories share; None while nothing is recorded."""
        return next((record.calls for record in self._records()), None)

    def shard(self, index: int) -> ShardFile | None:
        """Return the finished, intact shard of that sample-batch."""
        record = self._record(index)
        if record is not None and record.shard.is_intact(self._out):
            return record.shard
        if record_file(self._out, index).exists():
            _log.warning("sample-batch %d in `%s` is damaged; it is recorded again", index, self._out)
        return None

    def add(self, index: int, trajectory: Trajectory, *, num_samples: int, given: Given) -> None:
        """Write the shard of a sample-batch, and then its record.

        Raises:
            CalibrationError: its calls are not those of the other shards, or it cannot be written.
        """
        calls, shard = write_fitting(
            self._journal, index, trajectory, known=self.calls, num_samples=num_samples, given=given
        )
        record = ShardRecord(share=str(self._share), shard=shard, calls=calls, inputs=as_plain(given.inputs))
        record.write(self._out, index)

    def _records(self) -> Iterator[ShardRecord]:
        found = map(self._record, range(self._size))
        return (record for record in found if record is not None)

    def _record(self, index: int) -> ShardRecord | None:
        try:
            return ShardRecord.read(self._out, index)
        except CalibrationError:  # damaged
            return None

    def _check_place(self) -> None:
        check_is_open(self._out)
        if (self._out / PARTIAL).exists():
            raise CalibrationError(
                f"`{self._out}` holds an unfinished calibration of a single process; finish it with one "
                "process and without --shard, or choose another directory"
            )
