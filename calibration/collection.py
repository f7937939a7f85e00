"""A float pipeline's trajectories, recorded batch by batch and written to disk."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import errata
from errata import sharding
from errata.calibration.arguments import PipelineArguments, PlainInputs
from errata.calibration.calibration_set import CalibrationSet, load
from errata.calibration.document import Recording, Request
from errata.calibration.given import Given, Inputs, check_inputs, given_batches, take_prompts
from errata.calibration.merging import merge
from errata.calibration.pipelines import check_pipeline, run_batch, untouched
from errata.calibration.recorder import Recorder, Trajectory
from errata.calibration.shares import Shard, ShareRecording, Workers, holds_shares
from errata.calibration.sizes import MOST_SAMPLES, Sizes, choose_sizes
from errata.errors import CalibrationError
from errata.fingerprint import model_fingerprint, public_config, value_digest

__all__ = ["calibrate", "collect", "record_share"]


@dataclass(frozen=True)
class _Work:
    """What is recorded, checked: a request, and what it is made of."""

    pipe: DiffusionPipeline
    request: Request
    prompts: list[str] | None
    inputs: Iterable[Inputs] | None
    device: torch.device | None
    is_silent: bool


def calibrate(
    pipe: DiffusionPipeline,
    out: str | Path,
    *,
    num_inference_steps: int,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    prompts: Iterable[str] | None = None,
    inputs: Iterable[Inputs] | None = None,
    guidance_scale: float | None = None,
    device: str | torch.device | None = None,
    preset: str | None = None,
) -> CalibrationSet:
    """Run the float pipeline and record every denoiser call of every trajectory into the directory `out`.

    Sample i starts from a generator seeded with `seed + i`. One sample-batch is in memory at a time. A run
    that was killed continues with the same call: finished shards are kept, and the set ends up with
    the same bytes (same machine, versions and number of threads). `pipe` is left as it was found, and so is
    torch's random state. The progress bar counts denoiser calls; it is silent if the pipeline's own is.

    Processes of `accelerate launch` or `torchrun` share the sample-batches, and all of them must make this
    call; the set has the same bytes.

    Args:
        pipe: a diffusers pipeline with a `unet`.
        out: a directory to make, an empty one, or one that an interrupted run left.
        num_inference_steps: sampling steps; a sampler may call the denoiser more often than that.
        num_samples: trajectories to record; None is a number that fits the network, see
            `errata.calibration.choose_sizes`, or that of the unfinished work in `out`.
        batch_size: samples per run of the pipeline, and per shard; None likewise.
        seed: of the first sample.
        prompts: one text per sample, for a pipeline that takes `prompt`; surplus ones are not used.
        inputs: further keyword arguments of the pipeline, one mapping per sample-batch; surplus ones are not
            used. They are compared by content when a run is resumed.
        guidance_scale: passed on; None is the pipeline's default.
        device: where to run; None is where the pipeline is. Records lie on the CPU.
        preset: "laptop" for fewer samples and smaller batches where these are None.

    Raises:
        CalibrationError: an argument is out of range or not served by this pipeline; `out` cannot be
            written, or holds another request's work; a trajectory cannot be recorded.
    """
    out = Path(out)
    check_numbers(num_inference_steps, num_samples, batch_size, seed, guidance_scale)
    sizes = choose_sizes(pipe.unet, num_samples=num_samples, batch_size=batch_size, preset=preset, out=out)
    work = _checked(pipe, sizes, num_inference_steps, seed, prompts, inputs, guidance_scale, device)
    workers = Workers(on_cpu=work.request.device == "cpu")
    if workers.count == 1 and not holds_shares(out):
        _record_alone(out, work)
        return load(out)
    _record_shares(out, work, workers, Shard())
    if workers.is_first:
        merge([out], out)
    workers.wait()
    return load(out)


collect = calibrate
"""Older name of `calibrate`."""


def record_share(
    pipe: DiffusionPipeline,
    out: str | Path,
    *,
    shard: sharding.Shard,
    num_inference_steps: int,
    num_samples: int,
    batch_size: int,
    seed: int = 0,
    prompts: Iterable[str] | None = None,
    inputs: Iterable[Inputs] | None = None,
    guidance_scale: float | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Record the sample-batches of one share of a calibration set: the first half of `calibrate`.

    Sample-batch b belongs to share b mod `shard.count`. Jobs of several shares may use one directory, at the
    same time or one after another, or one each; `errata.calibration.merge` makes the set of them. A share
    that was killed continues with the same call. Processes of `torchrun` or `accelerate launch` divide the
    share once more.

    Args:
        pipe: as `calibrate` takes it, as are the others.
        out: a directory to make, an empty one, or one that holds shares of the same set.
        shard: which share.
        num_inference_steps: sampling steps.
        num_samples: trajectories of the whole set.
        batch_size: samples per run of the pipeline, and per shard.
        seed: of the first sample of the whole set.
        prompts: one text per sample of the whole set.
        inputs: one mapping per sample-batch of the whole set.
        guidance_scale: passed on; None is the pipeline's default.
        device: where to run; None is where the pipeline is.

    Raises:
        CalibrationError: as `calibrate`.
    """
    check_numbers(num_inference_steps, num_samples, batch_size, seed, guidance_scale)
    sizes = Sizes(num_samples=num_samples, batch_size=batch_size, reason="")
    work = _checked(pipe, sizes, num_inference_steps, seed, prompts, inputs, guidance_scale, device)
    workers = Workers(on_cpu=work.request.device == "cpu")
    _record_shares(Path(out), work, workers, shard)
    workers.wait()


def _checked(
    pipe: DiffusionPipeline,
    sizes: Sizes,
    num_inference_steps: int,
    seed: int,
    prompts: Iterable[str] | None,
    inputs: Iterable[Inputs] | None,
    guidance_scale: float | None,
    device: str | torch.device | None,
) -> _Work:
    check_pipeline(
        pipe,
        has_prompts=prompts is not None,
        has_inputs=inputs is not None,
        guidance_scale=guidance_scale,
    )
    texts = None if prompts is None else take_prompts(prompts, sizes.num_samples)
    target = None if device is None else find_device(device)
    request = describe_request(
        pipe,
        sizes,
        num_inference_steps=num_inference_steps,
        seed=seed,
        guidance_scale=guidance_scale,
        prompts=texts,
        takes_inputs=inputs is not None,
        device=target,
        fingerprint=model_fingerprint(pipe.unet),
    )
    batches = None if inputs is None else check_inputs(inputs, len(request.batch_sizes()))
    is_silent = bool(getattr(pipe, "_progress_bar_config", {}).get("disable", False))
    return _Work(pipe, request, texts, batches, target, is_silent)


def _record_alone(out: Path, work: _Work) -> None:
    """Record all sample-batches in this process, and finish the set."""
    mine = range(len(work.request.batch_sizes()))
    kept = PlainInputs()
    with Recording(out, work.request) as recording:
        with untouched(work.pipe, work.device):
            _fill(recording, work, mine, kept)
        prompts = None if work.prompts is None else tuple(work.prompts)
        PipelineArguments(prompts=prompts, inputs=kept.all()).write(out)
        recording.finish()


def _record_shares(out: Path, work: _Work, workers: Workers, shard: sharding.Shard) -> None:
    """Record the sample-batches of this process, beside those of others."""
    mine = workers.batches(shard, len(work.request.batch_sizes()))
    with (
        ShareRecording(out, work.request, work.prompts, share=shard) as recording,
        untouched(work.pipe, work.device),
    ):
        _fill(recording, work, mine, PlainInputs())
    # Nobody merges, or ends, before all are done.
    workers.wait()


def _fill(
    recording: Recording | ShareRecording, work: _Work, mine: Collection[int], kept: PlainInputs
) -> None:
    """Record every sample-batch in `mine` that has no finished shard yet; keep what each was given."""
    request, sizes = work.request, work.request.batch_sizes()
    total = len(mine) * request.num_inference_steps
    with tqdm(total=total, desc="calibrating", unit="call", disable=work.is_silent or None) as bar:
        for index, given in given_batches(work.inputs, len(sizes), mine):
            kept.add(given.inputs)
            if (shard := recording.shard(index)) is None:
                trajectory = _record(work, index, given, bar)
                recording.add(index, trajectory, num_samples=sizes[index], given=given)
            elif shard.inputs != given.digest:
                raise CalibrationError(
                    f"`inputs` for sample-batch {index} differ from those of its finished shard; "
                    "pass the same ones, or choose another directory"
                )
            elif recording.calls is not None:
                bar.update(len(recording.calls.timesteps))
            if recording.calls is not None:  # a sampler may take more calls than steps
                bar.total = len(mine) * len(recording.calls.timesteps)


def _record(work: _Work, index: int, given: Given, bar: "tqdm[NoReturn]") -> Trajectory:
    request = work.request
    first = index * request.batch_size
    samples = range(first, first + request.batch_sizes()[index])
    with Recorder(work.pipe.unet, on_call=bar.update) as recorder:
        run_batch(
            work.pipe,
            seeds=[request.seed + sample for sample in samples],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            prompts=None if work.prompts is None else work.prompts[samples.start : samples.stop],
            inputs=given.inputs,
        )
    return recorder.trajectory()


def find_device(device: str | torch.device) -> torch.device:
    """Return a device that torch can use.

    Raises:
        CalibrationError: it cannot use that one here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as problem:  # all three, by kind of device
        raise CalibrationError(
            f"`device` is {str(device)!r}, which torch cannot use here; try 'cpu'"
        ) from problem
    return found


def check_numbers(
    num_inference_steps: int,
    num_samples: int | None,
    batch_size: int | None,
    seed: int,
    guidance_scale: float | None,
) -> None:
    """Check the numbers of a request; None is one that is not chosen yet.

    Raises:
        CalibrationError: naming the number that is out of range.
    """
    counts = {
        "num_inference_steps": num_inference_steps,
        "num_samples": 1 if num_samples is None else num_samples,
        "batch_size": 1 if batch_size is None else batch_size,
    }
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise CalibrationError(f"`{name}` is {value!r}; expected a whole number of at least 1")
    most = MOST_SAMPLES if num_samples is None else num_samples
    if type(seed) is not int or not 0 <= seed < 2**63 - most:  # torch takes seeds of 64 bits
        raise CalibrationError(f"`seed` is {seed!r}; expected a whole number of at least 0, below 2**63")
    if guidance_scale is not None and not (
        type(guidance_scale) in (int, float) and math.isfinite(guidance_scale)
    ):
        raise CalibrationError(f"`guidance_scale` is {guidance_scale!r}; expected a finite number or None")


def describe_request(
    pipe: DiffusionPipeline,
    sizes: Sizes,
    *,
    num_inference_steps: int,
    seed: int,
    guidance_scale: float | None,
    prompts: list[str] | None,
    takes_inputs: bool,
    device: torch.device | None,
    fingerprint: str,
) -> Request:
    """Return the request of a calibration; `fingerprint` is that of the UNet, which takes long to compute."""
    return Request(
        pipeline_class=type(pipe).__name__,
        unet_class=type(pipe.unet).__name__,
        scheduler_class=type(pipe.scheduler).__name__,
        scheduler_config=public_config(pipe.scheduler.config),
        fingerprint=fingerprint,
        num_inference_steps=num_inference_steps,
        num_samples=sizes.num_samples,
        batch_size=sizes.batch_size,
        seed=seed,
        guidance_scale=guidance_scale,
        prompts=None if prompts is None else value_digest(prompts, name="prompts"),
        takes_inputs=takes_inputs,
        device=(device or pipe.device).type,
        versions={
            "errata": errata.__version__,
            "torch": str(torch.__version__),
            "diffusers": version("diffusers"),
        },
    )
