"""What a report will take: before its first batch from single images, after it from that batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from errata.durations import duration
from errata.errors import ReportError
from errata.estimates import Estimate, Need, disk_need, size_text
from errata.memory import MemoryMeter
from errata.report.report_index import ReportIndex, RowSpec
from errata.report.request import ReportRequest
from errata.report.sampling import BatchSampler
from errata.report.sharding import Shard
from errata.report.store import FOLDER, MeasurementStore

# Bytes of a number in the measurements, and class scores that a feature network may add to its features.
_FLOAT, _SCORES = 4, 1008
_WAYS_OUT = "lower `batch_size`, or report on fewer artifacts at once"


class DoesNotFitError(ReportError):
    """The work does not fit into memory or on the disk, and nothing was measured."""


def warm_up(
    request: ReportRequest,
    folder: Path,
    rows: Sequence[RowSpec],
    store: MeasurementStore,
    sampler: BatchSampler,
) -> Estimate | None:
    """Sample one image with each artifact and the float model, as a warm-up; return what that tells.

    Times of the estimate are those of single images without correction; batches take less for each image,
    corrections with extra calls more. None where the first batch of all of them is measured already.

    Raises:
        DoesNotFitError: a batch does not fit into memory, or the measurements do not fit on the disk.
    """
    plain = [row for row in rows if row.role in ("float", "uncorrected") and not store.has(row.directory, 0)]
    if not plain:
        return None
    meter, batch = MemoryMeter(request.device.type), len(store.batches[0])
    seconds: dict[str, float] = {}
    growth = 0
    for row in plain:
        seconds[row.artifact], grown = _sampled(row, sampler, meter, batch)
        growth = max(growth, grown)
    estimate = _estimate(request, folder, rows, meter, seconds, growth)
    estimate.check(error=DoesNotFitError)
    return estimate


def _sampled(row: RowSpec, sampler: BatchSampler, meter: MemoryMeter, batch: int) -> tuple[float, int]:
    """Return the seconds of one image, and the bytes that memory grows by for a batch.

    Where a batch of the size of one image times their number would not fit, a second run tells what grows
    with the number of images and what is needed once.
    """
    meter.restart()
    start = time.perf_counter()
    sampler.warm_up(row)
    seconds, one = time.perf_counter() - start, meter.growth() or 0
    if meter.available is None or batch == 1 or one * batch <= meter.available:
        return seconds, one * batch
    meter.restart()
    sampler.warm_up(row, images=2)
    return seconds, one + (batch - 1) * max(0, (meter.growth() or 0) - one)


def _estimate(
    request: ReportRequest,
    folder: Path,
    rows: Sequence[RowSpec],
    meter: MemoryMeter,
    seconds: Mapping[str, float],
    growth: int,
) -> Estimate:
    images = len(rows) * request.samples
    disk = images * _FLOAT * (request.reference.statistics.dimension + _SCORES)
    needed = growth + meter.mapped
    slowest = max(seconds.values())
    return Estimate(
        work=f"{len(rows)} rows of {request.samples} images in batches of {request.batch_size}",
        seconds=sum(request.samples * seconds.get(row.artifact, slowest) for row in rows),
        disk_bytes=disk,
        memory_bytes=meter.held + needed,
        call_seconds=slowest,
        call_samples=1,
        needs=(
            Need(what="memory", needed=needed, available=meter.available, way_out=_WAYS_OUT),
            disk_need(folder, disk, way_out="lower `samples`, or choose another `out`"),
        ),
    )


def forget_unused(out: Path) -> None:
    """Remove the measurements in `out` if there is none yet, so that a run with other settings may begin."""
    folder = out / FOLDER
    if next(folder.rglob("*.safetensors"), None) is None:
        shutil.rmtree(folder, ignore_errors=True)


def early_text(estimate: Estimate) -> str:
    """Return what is known before the first batch, in a line."""
    return (
        f"{estimate.work}: at most about {duration(estimate.seconds)} without extra calls, at "
        f"{duration(estimate.call_seconds)} for an image alone; {size_text(estimate.disk_bytes)} of "
        "measurements at most; the first batch of every row tells more exactly"
    )


def promise(index: ReportIndex, store: MeasurementStore, shard: Shard) -> str:
    """Return what is known after the first batch, in a line.

    Raises:
        ReportError: what is left does not fit on the disk; the first batch stays.
    """
    measured = [row for row in index.rows if store.has(row.directory, 0)]
    facts = [store.facts_of(row.directory, 0) for row in measured]
    peaks = [each.peak_bytes for each in facts if each.peak_bytes is not None]
    stored = sum(store.size(row.directory, 0) for row in measured) / max(1, len(measured))
    total = int(stored * len(index.rows) * sum(index.batches) / index.batches[0] / shard.count)
    way_out = "lower `samples`, or choose another `out`"
    need = disk_need(store.folder, max(0, total - int(stored) * len(measured)), way_out=way_out)
    work = f"{len(index.rows)} rows of {sum(index.batches)} images"
    share = f", shard {shard}" if shard.count > 1 else ""
    seconds = index.promised_seconds / shard.count
    Estimate(
        work=work,
        seconds=seconds,
        disk_bytes=total,
        memory_bytes=None,
        call_seconds=0,
        call_samples=1,
        needs=(need,),
    ).check(error=ReportError)
    memory = f", {size_text(max(peaks))} of memory at peak" if peaks else ""
    return (
        f"{work}{share}: about {duration(seconds)} of denoiser calls, in one process, "
        f"{size_text(total)} of measurements{memory}"
    )
