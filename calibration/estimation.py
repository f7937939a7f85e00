"""`estimate`: what a calibration will take, from the first calls of its pipeline; nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata import canonical_json
from errata.calibration.arguments import PipelineArguments, PlainInputs
from errata.calibration.collection import check_numbers, describe_request, find_device
from errata.calibration.document import FORMAT, RULES, Calls, Request, check_is_open
from errata.calibration.first_calls import FirstCalls, first_calls
from errata.calibration.given import Inputs, take_prompts
from errata.calibration.pipelines import check_pipeline, untouched
from errata.calibration.shards import Shard, shard_bytes, shard_name
from errata.calibration.sizes import Sizes, choose_sizes
from errata.estimates import Estimate, Need, disk_need
from errata.journal_rules import finished_items
from errata.memory import MemoryMeter, available_memory

# A trajectory is in memory three times while its shard is made: as tensors, as the bytes of each, as a file.
_COPIES_OF_SHARD = 3
# A whole batch is tried if that takes less than this part of the work, or less than a second.
_SMALL_PART, _SHORT = 1 / 20, 1.0
_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class CalibrationEstimate(Estimate):
    """What a calibration will take.

    Attributes:
        num_samples: trajectories to record.
        batch_size: of them per run of the pipeline.
        num_calls: denoiser calls of each trajectory.
        finished: batches that an interrupted run has recorded already.
    """

    num_samples: int
    batch_size: int
    num_calls: int
    finished: int


def estimate(
    pipe: DiffusionPipeline,
    out: str | Path | None = None,
    *,
    num_inference_steps: int,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    inputs: Iterable[Inputs] | None = None,
    guidance_scale: float | None = None,
    device: str | torch.device | None = None,
    preset: str | None = None,
) -> CalibrationEstimate:
    """Return what `calibrate` will take with the same arguments, from the first calls of short runs.

    The pipeline runs for a call or a few short ones, with one sample and, where that fits, with a whole
    batch. `pipe` is left as it was found, and nothing is written. `check(error=...)` of the result refuses
    what cannot fit. Without `out` disk space is that of the current directory.

    A batch size that was not asked for is halved until it fits into memory. Of `inputs` only the first
    mapping is drawn; without a batch size, it is for as many samples as `choose_sizes` says.

    Raises:
        CalibrationError: as `calibrate`, as far as that is known before the work.
    """
    place = None if out is None else Path(out)
    check_numbers(num_inference_steps, num_samples, batch_size, seed, guidance_scale)
    check_pipeline(
        pipe,
        has_prompts=prompts is not None,
        has_inputs=inputs is not None,
        guidance_scale=guidance_scale,
    )
    if place is not None:
        check_is_open(place)
    sizes = choose_sizes(pipe.unet, num_samples=num_samples, batch_size=batch_size, preset=preset, out=place)
    target = None if device is None else find_device(device)
    request = describe_request(
        pipe,
        sizes,
        num_inference_steps=num_inference_steps,
        seed=seed,
        guidance_scale=guidance_scale,
        prompts=None if prompts is None else take_prompts(prompts, sizes.num_samples),
        takes_inputs=inputs is not None,
        device=target,
        fingerprint=_DIGEST,
    )
    given = None if inputs is None else next(iter(inputs), None)
    with untouched(pipe, target):
        trial = _Trial(pipe, request, prompts, given, may_halve=batch_size is None)
        trial.run()
    return _estimate_of(trial, sizes, place)


class _Trial:
    """Short runs with one sample and with more, and the batch size that they lead to."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        request: Request,
        prompts: Sequence[str] | None,
        inputs: Inputs | None,
        *,
        may_halve: bool,
    ) -> None:
        self._pipe, self._prompts, self._inputs = pipe, prompts, inputs
        self._may_halve = may_halve
        self._inputs_size = request.batch_sizes()[0]
        self.request = request
        self.meter = MemoryMeter(pipe.device.type)
        self.available = available_memory()
        self.seen: list[FirstCalls] = []

    @property
    def batch(self) -> int:
        """Samples of a whole batch."""
        return self.request.batch_sizes()[0]

    @property
    def latest(self) -> FirstCalls:
        """The run with the most samples."""
        return self.seen[-1]

    def run(self) -> None:
        """Try one sample; then two where one leaves it open whether a batch fits; then a whole batch."""
        self._try(1)
        if not self.fits and self.batch > 1:
            self._try(min(2, self.batch))
        while not self.fits and self.batch > 1 and self._may_halve:
            self.request = dataclasses.replace(self.request, batch_size=self.batch // 2)
        if self.fits and self.batch > self.latest.num_samples and self._is_worthwhile():
            self._try(self.batch)

    @property
    def seconds(self) -> float:
        """Of one call of a whole batch."""
        return self.latest.seconds * self.batch / self.latest.num_samples

    @property
    def growth(self) -> int | None:
        """Bytes that memory grows by in a call of a whole batch; None if that is not known."""
        growths = {each.num_samples: each.growth for each in self.seen if each.growth is not None}
        if len(growths) < len(self.seen):
            return None
        most, fewest = max(growths), min(growths)
        if most == fewest:  # what grows once is counted for every sample: an upper bound
            return growths[most] * self.batch // most
        slope = max(0, growths[most] - growths[fewest]) / (most - fewest)
        return int(growths[most] + slope * (self.batch - most))

    @property
    def shard(self) -> int:
        """Bytes of the shard of a whole batch."""
        return shard_bytes(_tensors(self.latest, self.batch))

    @property
    def needs(self) -> list[Need]:
        """Memory for the calls, and for the trajectory of a batch."""
        on_cuda = self._pipe.device.type == "cuda"
        kept, growth = _COPIES_OF_SHARD * self.shard, self.growth or 0
        way_out = (
            "lower `batch_size`, or leave it out with preset=laptop"
            if self.batch > 1
            else "free some memory, or use a machine with more: the batch has a single sample"
        )
        if on_cuda:
            return [
                Need(what="GPU memory", needed=growth, available=self.meter.available, way_out=way_out),
                Need(what="memory", needed=kept, available=self.available, way_out=way_out),
            ]
        needed = max(growth + self.shard, kept) + self.meter.mapped
        return [Need(what="memory", needed=needed, available=self.meter.available, way_out=way_out)]

    @property
    def fits(self) -> bool:
        """Whether a whole batch fits into memory, as far as is known."""
        return all(need.fits for need in self.needs)

    def arguments_bytes(self) -> int:
        """Return the size of `arguments.json`; 0 where there is none. Batches are taken to be alike."""
        prompts = None if self._prompts is None else tuple(self._prompts[: self.request.num_samples])
        kept = PlainInputs()
        for _ in self.request.batch_sizes():
            kept.add(self._inputs)
        return PipelineArguments(prompts=prompts, inputs=kept.all()).num_bytes

    def _is_worthwhile(self) -> bool:
        samples = self.request.num_samples * len(self.latest.timesteps)
        return self.seconds < _SHORT or self.batch <= _SMALL_PART * samples

    def _try(self, count: int) -> None:
        self.seen.append(
            first_calls(
                self._pipe,
                self.meter,
                seeds=[self.request.seed + sample for sample in range(count)],
                num_inference_steps=self.request.num_inference_steps,
                guidance_scale=self.request.guidance_scale,
                prompts=None if self._prompts is None else list(self._prompts[:count]),
                inputs=None if self._inputs is None else _first_of(self._inputs, self._inputs_size, count),
            )
        )


def _first_of(inputs: Mapping[str, Any], size: int, count: int) -> dict[str, Any]:
    """Return a batch's arguments for its first samples: whatever has one entry for each sample is cut."""

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, list | tuple | Tensor) and len(value) == size else value

    return {name: cut(value) for name, value in inputs.items()}


def _tensors(seen: FirstCalls, count: int) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """Return type and shape of the tensors of a shard of `count` samples."""
    calls, trajectory = len(seen.timesteps), seen.trajectory
    rows, recorded = trajectory.num_rows, trajectory.num_calls
    per_sample = rows // seen.num_samples

    def grown(value: Tensor) -> tuple[torch.dtype, Sequence[int]]:
        first, *rest = value.shape
        if rest and rest[0] == rows:
            rest[0] = per_sample * count
        return value.dtype, (calls if first == recorded and recorded > 1 else 1, *rest)

    return {
        "sample": (trajectory.sample.dtype, (calls, per_sample * count, *trajectory.sample.shape[2:])),
        "timestep": (trajectory.timestep.dtype, (calls,)),
        **{f"cond.{name}": grown(value) for name, value in trajectory.cond.items()},
    }


def _estimate_of(trial: _Trial, sizes: Sizes, out: Path | None) -> CalibrationEstimate:
    request, seen = trial.request, trial.latest
    finished = 0 if out is None else len(finished_items(out, RULES))
    left = request.batch_sizes()[finished:]
    calls = len(seen.timesteps)
    disk = sum(shard_bytes(_tensors(seen, count)) for count in left) + _document_bytes(trial)
    needs = [
        *trial.needs,
        disk_need(out or Path(), disk, way_out="lower `num_samples`, or choose another `out`"),
    ]
    notes = []
    if sizes.reason:
        halved = "" if request.batch_size == sizes.batch_size else ", halved until it fits into memory"
        notes.append(
            f"{request.num_samples} samples in batches of {request.batch_size}, {sizes.reason}{halved}"
        )
    if finished:
        notes.append(f"{finished} of {len(request.batch_sizes())} batches are recorded already")
    return CalibrationEstimate(
        work=f"recording {request.num_samples} samples of {calls} calls in batches of {request.batch_size}",
        seconds=sum(seen.before + calls * trial.seconds * count / trial.batch for count in left),
        disk_bytes=disk,
        memory_bytes=None if trial.growth is None else trial.meter.held + trial.needs[0].needed,
        call_seconds=seen.seconds,
        call_samples=seen.num_samples,
        needs=tuple(needs),
        notes=tuple(notes),
        num_samples=request.num_samples,
        batch_size=request.batch_size,
        num_calls=calls,
        finished=finished,
    )


def _document_bytes(trial: _Trial) -> int:
    """Return the size of `calibration.json` and `arguments.json`.

    Exact, but for the texts of `inputs` of other batches than the first.
    """
    request, seen = trial.request, trial.latest
    calls = dataclasses.replace(Calls.of(seen.trajectory, seen.num_samples, 0), timesteps=seen.timesteps)
    shards = [_shard(seen, index, count, request) for index, count in enumerate(request.batch_sizes())]
    plain = {
        "request": dataclasses.asdict(request),
        "calls": dataclasses.asdict(calls),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    return len(canonical_json.dumps({"format": FORMAT, **plain})) + trial.arguments_bytes()


def _shard(seen: FirstCalls, index: int, count: int, request: Request) -> Shard:
    tensors = _tensors(seen, count)
    return Shard(
        file=shard_name(index),
        sha256=_DIGEST,
        num_bytes=shard_bytes(tensors),
        num_samples=count,
        inputs=_DIGEST if request.takes_inputs else None,
        tensors={
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            for name, (dtype, shape) in tensors.items()
        },
    )
