"""A finished calibration set: what was recorded, read step by step without loading the rest."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.calibration.arguments import ARGUMENTS, PipelineArguments
from errata.calibration.document import FINISHED, PARTIAL, Document
from errata.calibration.shards import Shard, StepReader
from errata.calibration.shares import holds_shares
from errata.errors import CalibrationError
from errata.fingerprint import value_digest
from errata.plain_json import from_plain
from errata.runtime.sampler import calls_per_step

__all__ = ["CalibrationSet", "Record", "load"]

_AGAIN = "record it again with `errata calibrate` or errata.calibration.calibrate"
_MADE = "give a directory that `errata calibrate` or errata.calibration.calibrate made"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One denoiser call for some samples, on the CPU, in the dtypes that the pipeline passed.

    Args:
        sample: (rows, C, H, W), the denoiser's input.
        timestep: (), the call's timestep.
        cond: the denoiser's other arguments by name, as `errata.calibration.nest` understands them; empty
            for an unconditional model.
        step: index of the call in the trajectory.

    With guidance there are several rows per sample: the unconditional ones of all samples first, then the
    conditional ones, as diffusers passes them.
    """

    sample: Tensor
    timestep: Tensor
    cond: dict[str, Tensor]
    step: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Record":
        """Return the same call on another device, floating-point tensors in that type; the timestep stays."""

        def fit(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        cond = {name: fit(value) for name, value in self.cond.items()}
        return replace(self, sample=self.sample.to(device, dtype), cond=cond)


class CalibrationSet:
    """The trajectories of a float pipeline. Made by `load`, which checks it."""

    def __init__(self, path: Path, document: Document) -> None:
        if document.calls is None:
            raise CalibrationError(f"`{path}` holds no shard; {_AGAIN}")
        self._path = path
        self._request = document.request
        self._calls = document.calls
        self._shards = document.shards

    def __repr__(self) -> str:
        return f"CalibrationSet({str(self._path)!r}, {self.num_samples} samples, {self.num_steps} steps)"

    @property
    def path(self) -> Path:
        """Its directory."""
        return self._path

    @property
    def num_steps(self) -> int:
        """Denoiser calls of each trajectory; at least `num_inference_steps` for most samplers."""
        return len(self._calls.timesteps)

    @property
    def calls_per_step(self) -> int:
        """Denoiser calls of each sampler step; 2 where guidance calls once for each of its halves."""
        return calls_per_step(self.timesteps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Training time of each denoiser call; whole numbers are of type int. A sampler may repeat one."""
        return self._calls.timesteps

    @property
    def num_samples(self) -> int:
        """Recorded trajectories."""
        return self._request.num_samples

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps of the request."""
        return self._request.num_inference_steps

    @property
    def seed(self) -> int:
        """Seed of the first trajectory; trajectory i has `seed + i`."""
        return self._request.seed

    @property
    def guidance_scale(self) -> float | None:
        """Guidance of the request; None is the pipeline's default."""
        return self._request.guidance_scale

    @property
    def rows_per_sample(self) -> int:
        """Batch rows per sample, 2 with classifier-free guidance."""
        return self._calls.rows_per_sample

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the denoiser's input."""
        return self._calls.sample_shape

    @property
    def cond_names(self) -> tuple[str, ...]:
        """Names of the denoiser's other arguments, sorted."""
        return self._calls.cond

    @property
    def scheduler_class(self) -> str:
        """Class name of the sampler."""
        return self._request.scheduler_class

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of the sampler; tuples and arrays are lists."""
        config: dict[str, Any] = from_plain(self._request.scheduler_config)
        return config

    @property
    def pipeline_class(self) -> str:
        """Class name of the pipeline."""
        return self._request.pipeline_class

    @property
    def unet_class(self) -> str:
        """Class name of the denoiser."""
        return self._request.unet_class

    @property
    def fingerprint(self) -> str:
        """`errata.calibration.model_fingerprint` of the float denoiser."""
        return self._request.fingerprint

    @property
    def batch_size(self) -> int:
        """Samples of a sample-batch; the last one may have fewer."""
        return self._request.batch_size

    def arguments(self, inputs: Iterable[Mapping[str, Any]] | None = None) -> PipelineArguments | None:
        """Return the prompts and other arguments that the pipeline was called with.

        None where the set does not hold all of them: images and tensors are not kept, and earlier releases
        kept nothing. `inputs` are those that `calibrate` was given, to be taken in place of what is kept.

        Raises:
            CalibrationError: they were altered, or `inputs` are others.
        """
        kept = PipelineArguments.read(self._path) or PipelineArguments()
        if inputs is not None:
            kept = replace(kept, inputs=tuple(islice(inputs, len(self._shards))))
        prompts = None if kept.prompts is None else value_digest(kept.prompts, name="prompts")
        digests = [value_digest(mapping, name="inputs") for mapping in kept.inputs or ()]
        recorded = [shard.inputs for shard in self._shards if shard.inputs is not None]
        if inputs is not None and digests != recorded:
            raise CalibrationError(
                f"`inputs` are not those that `{self._path}` was recorded with; give the input images and "
                "other arguments that `calibrate` was given"
            )
        if prompts not in (None, self._request.prompts) or digests not in ([], recorded):
            raise CalibrationError(
                f"`{self._path / ARGUMENTS}` was altered: its digest is not the recorded one; {_AGAIN}"
            )
        is_complete = prompts == self._request.prompts and digests == recorded
        return kept if is_complete else None

    @property
    def versions(self) -> dict[str, str]:
        """Releases of errata, torch and diffusers that recorded it."""
        return dict(self._request.versions)

    def batches(
        self, step: int, *, start: int = 0, limit: int | None = None, batch_size: int | None = None
    ) -> Iterator[Record]:
        """Yield what the denoiser got at a step, always in the order of the samples.

        Only that step is read from disk. Without `batch_size` a record is a shard; with it a record has at
        most that many samples, and never samples of two shards.

        Args:
            step: index of the denoiser call.
            start: the first sample.
            limit: stop after that many samples.
            batch_size: samples per record.

        Raises:
            CalibrationError: the step was not recorded, a number is below 1 (`start`: below 0), or a shard
                cannot be read.
        """
        if not 0 <= step < self.num_steps:
            raise CalibrationError(
                f"step {step} was not recorded; recorded steps are 0-{self.num_steps - 1}; calibrate again "
                "with more num_inference_steps (`errata calibrate --steps`)"
            )
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise CalibrationError(f"`{name}` is {value}; expected at least 1")
        if start < 0:
            raise CalibrationError(f"`start` is {start}; expected at least 0")
        end = self.num_samples if limit is None else start + limit
        return self._batches(step, start, end, batch_size)

    def _batches(self, step: int, start: int, end: int, batch_size: int | None) -> Iterator[Record]:
        """Yield samples `start` to `end`."""
        before = 0
        for shard in self._shards:
            begin, stop = max(0, start - before), min(shard.num_samples, end - before)
            before += shard.num_samples
            if stop <= begin:
                continue
            reader = StepReader(self._path / shard.file, shard, rows_per_sample=self.rows_per_sample)
            for first in range(begin, stop, batch_size or stop - begin):
                last = min(first + (batch_size or stop), stop)
                yield Record(
                    sample=reader.sample(step, first, last),
                    timestep=reader.timestep(step),
                    cond=reader.cond(step, first, last),
                    step=step,
                )

    def verify(self) -> None:
        """Compare every shard with its recorded SHA-256; reads the whole set.

        Raises:
            CalibrationError: a shard is missing or altered.
        """
        for shard in self._shards:
            _check_presence(self._path, shard)
            if not shard.is_intact(self._path):
                raise CalibrationError(
                    f"shard `{self._path / shard.file}` was altered: its SHA-256 is not the recorded "
                    f"{shard.sha256[:12]}…; {_AGAIN}"
                )


def load(path: str | Path) -> CalibrationSet:
    """Open a calibration set. Sizes are checked now, contents by `CalibrationSet.verify`.

    Raises:
        CalibrationError: no calibration there, an unfinished or damaged one, one of another format version,
            or a shard that is missing or has another size.
    """
    path = Path(path)
    if not path.is_dir():
        raise CalibrationError(f"`{path}` is not a directory; {_MADE}")
    if not (path / FINISHED).exists():
        if (path / PARTIAL).exists():
            raise CalibrationError(
                f"`{path}` holds an unfinished calibration; run `errata calibrate` again with the "
                "same arguments to finish it"
            )
        if holds_shares(path):
            raise CalibrationError(
                f"`{path}` holds shares of a calibration; once all are recorded, make the set of them with "
                "`errata calibrate --merge` or errata.calibration.merge"
            )
        raise CalibrationError(f"`{path}` is not a calibration set: it has no {FINISHED}; {_MADE}")
    document = Document.read(path / FINISHED)
    if len(document.shards) != len(document.request.batch_sizes()):
        raise CalibrationError(
            f"`{path / FINISHED}` is damaged: it lists {len(document.shards)} shards for "
            f"{len(document.request.batch_sizes())} sample-batches; {_AGAIN}"
        )
    for shard in document.shards:
        _check_presence(path, shard)
    return CalibrationSet(path, document)


def _check_presence(root: Path, shard: Shard) -> None:
    path = root / shard.file
    if not path.is_file():
        raise CalibrationError(f"shard `{path}` is missing; {_AGAIN}")
    if (size := path.stat().st_size) != shard.num_bytes:
        raise CalibrationError(
            f"shard `{path}` has {size} bytes, expected {shard.num_bytes}: it was cut off or replaced; "
            f"{_AGAIN}"
        )
