"""`merge`: shares that are complete become a calibration set; no model is needed.

The set has the bytes that one process would have written. Everything is checked before anything is written.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata import canonical_json
from errata.calibration.arguments import PipelineArguments
from errata.calibration.calibration_set import CalibrationSet, load
from errata.calibration.document import FINISHED, FORMAT, Document, Request, check_same_calls
from errata.calibration.entries import build
from errata.calibration.shards import FOLDER
from errata.calibration.shares import RECORDS, RULES, ShardRecord, holds_shares
from errata.directories import refusals_as, staged_directory, whole_file, write_whole
from errata.errors import CalibrationError
from errata.fingerprint import value_digest
from errata.journal_rules import locked, read_request
from errata.request_differences import differences

__all__ = ["merge"]

_ADVICE = "free some space, or choose another directory"
_SHOWN = 8


@dataclass(frozen=True)
class _Source:
    """A directory of shares: its request, the prompts, and records by the number of the sample-batch."""

    root: Path
    request: Request
    prompts: tuple[str, ...] | None
    records: dict[int, ShardRecord]


@dataclass(frozen=True)
class _Found:
    """Where a sample-batch was recorded."""

    root: Path
    record: ShardRecord


def merge(sources: Sequence[str | Path], out: str | Path) -> CalibrationSet:
    """Make a calibration set of shares that are complete; no model is needed.

    Args:
        sources: directories that `record_share` filled; a sample-batch that one lacks may lie in another.
        out: one of them, where the set takes the place of the shares, or a new directory, which gets copies.

    Raises:
        CalibrationError: sample-batches are missing or damaged, or do not belong together; or `out` is taken.
    """
    if not sources:
        raise CalibrationError("there is nothing to merge; give the --out of one share or more")
    out = Path(out)
    if (out / FINISHED).is_file() and holds_shares(out):  # killed after the set was complete
        with _refusals(out), locked(out / RULES.lock):
            _remove_shares(out)
        return load(out)
    found = [_read_source(Path(source)) for source in sources]
    batches = _batches(found)
    if out.resolve() in [source.root.resolve() for source in found]:
        _finish_in_place(out, found[0], batches)
    else:
        with _refusals(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with staged_directory(out, error=CalibrationError) as staging, _refusals(out):
            _copy_missing(staging, batches)
            _write_set(staging, found[0], batches)
    return load(out)


def _read_source(root: Path) -> _Source:
    if (root / FINISHED).is_file():
        raise CalibrationError(f"`{root}` holds a finished calibration; there is nothing to merge")
    if not holds_shares(root):
        raise CalibrationError(
            f"`{root}` holds no shares of a calibration; give the --out of `errata calibrate --shard`"
        )
    content, notes = read_request(root, RULES)
    try:
        request = build(Request, content, "request")
        prompts = None if notes["prompts"] is None else tuple(notes["prompts"])
        if request.prompts != (None if prompts is None else value_digest(prompts, name="prompts")):
            raise ValueError("its prompts were altered")
        records = dict(_records(root))
        if others := sorted(set(records) - set(range(len(request.batch_sizes())))):
            raise ValueError(f"it has the sample-batch {others[0]}, and the request has fewer")
    except (KeyError, TypeError, ValueError) as problem:
        raise CalibrationError(f"`{root}` is damaged: {problem}; record it again") from problem
    return _Source(root, request, prompts, records)


def _records(root: Path) -> Iterator[tuple[int, ShardRecord]]:
    for file in sorted((root / RECORDS).glob("[0-9]*.json")):
        index = int(file.stem)
        if (record := ShardRecord.read(root, index)) is not None:
            yield index, record


def _batches(sources: Sequence[_Source]) -> list[_Found]:
    """Return where each sample-batch is, after all checks."""
    first = sources[0]
    found: dict[int, _Found] = {}
    for source in sources:
        if changed := differences(dataclasses.asdict(first.request), dataclasses.asdict(source.request)):
            raise CalibrationError(
                f"`{source.root}` holds shares of another calibration than `{first.root}`: "
                f"{'; '.join(changed)}; leave it out, or record it again with the same arguments"
            )
        for index, record in source.records.items():
            one = found.setdefault(index, _Found(source.root, record))
            if one.record.shard != record.shard:
                raise CalibrationError(
                    f"sample-batch {index} differs between `{one.root}` and `{source.root}`: they were "
                    "recorded with other hardware, number of threads or inputs; leave one of them out"
                )
    _check_complete(first.request, found, sources)
    known = found[0].record.calls
    for index in sorted(found):
        check_same_calls(known, found[index].record.calls, index)
        _check_bytes(found[index], index)
    return [found[index] for index in sorted(found)]


def _check_complete(request: Request, found: dict[int, _Found], sources: Sequence[_Source]) -> None:
    total = len(request.batch_sizes())
    missing = [index for index in range(total) if index not in found]
    if not missing:
        return
    places = ", ".join(f"`{source.root}`" for source in sources[:_SHOWN])
    counts = {one.record.share.partition("/")[2] for one in found.values()}
    if len(counts) == 1:  # all of them were recorded as shares of so many
        count = int(counts.pop())
        shares = _listed([f"{share}/{count}" for share in sorted({index % count for index in missing})])
        advice = f"record the shards {shares} again, by the same `errata calibrate` with --shard"
    else:
        advice = "run their shares again: with --shard I/N, sample-batch b belongs to share b mod N"
    raise CalibrationError(
        f"{len(missing)} of {total} sample-batches are missing in {places} (numbers {_listed(missing)}, from "
        f"0); {advice}"
    )


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (", …" if len(items) > _SHOWN else "")


def _check_bytes(found: _Found, index: int) -> None:
    record = found.record
    if not record.shard.is_intact(found.root):
        raise CalibrationError(
            f"shard `{found.root / record.shard.file}` (sample-batch {index}) is missing or was altered; run "
            f"`errata calibrate` with the same arguments and --shard {record.share} again"
        )


def _finish_in_place(out: Path, first: _Source, batches: Sequence[_Found]) -> None:
    with _refusals(out), locked(out / RULES.lock):
        if (out / FINISHED).exists():
            raise CalibrationError(f"`{out}` was finished by another process in the meantime; use it")
        _copy_missing(out, batches)
        _write_set(out, first, batches)
        _remove_shares(out)


def _copy_missing(out: Path, batches: Sequence[_Found]) -> None:
    """Copy the shards that lie elsewhere; in a directory of shares their records follow."""
    (out / FOLDER).mkdir(exist_ok=True)
    for index, found in enumerate(batches):
        target = out / found.record.shard.file
        if found.root.resolve() == out.resolve():
            continue
        with whole_file(target, error=CalibrationError, advice=_ADVICE) as partial:
            shutil.copyfile(found.root / found.record.shard.file, partial)
        if holds_shares(out):
            found.record.write(out, index)


def _write_set(out: Path, source: _Source, batches: Sequence[_Found]) -> None:
    """Write what belongs beside the shards, `calibration.json` last."""
    inputs = [found.record.inputs for found in batches]
    plain = tuple(each for each in inputs if each is not None)
    arguments = PipelineArguments(prompts=source.prompts, inputs=plain if len(plain) == len(inputs) else None)
    arguments.write(out)
    document = Document(
        request=source.request,
        calls=batches[0].record.calls,
        shards=tuple(found.record.shard for found in batches),
    )
    data = canonical_json.dumps({"format": FORMAT, **dataclasses.asdict(document)})
    write_whole(out / FINISHED, data, error=CalibrationError, advice=_ADVICE)


def _remove_shares(out: Path) -> None:
    """Remove what only shares have; the file that tells of them goes last."""
    shutil.rmtree(out / RECORDS, ignore_errors=True)
    for leftover in (out / FOLDER).glob(".*.partial"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    (out / RULES.lock).unlink(missing_ok=True)
    (out / RULES.request).unlink(missing_ok=True)


def _refusals(out: Path) -> Any:
    return refusals_as(CalibrationError, doing=f"write to `{out}`", advice=_ADVICE)
