"""A float pipeline's trajectories, recorded batch by batch and written to disk."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import errata
from errata.calibration.arguments import PipelineArguments, PlainInputs
from errata.calibration.calibration_set import CalibrationSet, load
from errata.calibration.document import Recording, Request
from errata.calibration.pipelines import check_pipeline, run_batch, untouched
from errata.calibration.recorder import Recorder, Trajectory
from errata.calibration.sizes import MOST_SAMPLES, Sizes, choose_sizes
from errata.errors import CalibrationError
from errata.fingerprint import model_fingerprint, public_config, value_digest

__all__ = ["calibrate", "collect"]

Inputs = Mapping[str, Any]


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
    check_pipeline(
        pipe,
        has_prompts=prompts is not None,
        has_inputs=inputs is not None,
        guidance_scale=guidance_scale,
    )
    sizes = choose_sizes(pipe.unet, num_samples=num_samples, batch_size=batch_size, preset=preset, out=out)
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
    with Recording(out, request) as recording:
        with untouched(pipe, target):
            kept = _fill(recording, pipe, request, texts, batches, is_silent=is_silent)
        prompts = None if texts is None else tuple(texts)
        PipelineArguments(prompts=prompts, inputs=kept.all()).write(out)
        recording.finish()
    return load(out)


collect = calibrate
"""Older name of `calibrate`."""


def _fill(
    recording: Recording,
    pipe: DiffusionPipeline,
    request: Request,
    prompts: list[str] | None,
    inputs: Iterable[Inputs] | None,
    *,
    is_silent: bool,
) -> PlainInputs:
    """Record every sample-batch that has no finished shard yet; return what each was given."""
    sizes = request.batch_sizes()
    given = _digested(inputs, len(sizes))
    total = len(sizes) * request.num_inference_steps
    kept = PlainInputs()
    with tqdm(total=total, desc="calibrating", unit="call", disable=is_silent or None) as bar:
        for index, (size, (mapping, digest)) in enumerate(zip(sizes, given, strict=True)):
            kept.add(mapping)
            if (shard := recording.shard(index)) is None:
                samples = range(index * request.batch_size, index * request.batch_size + size)
                trajectory = _record(pipe, request, samples, prompts, mapping, bar)
                recording.add(index, trajectory, num_samples=size, inputs=digest)
            elif shard.inputs != digest:
                raise CalibrationError(
                    f"`inputs` for sample-batch {index} differ from those of its finished shard; "
                    "pass the same ones, or choose another directory"
                )
            elif recording.calls is not None:
                bar.update(len(recording.calls.timesteps))
            if recording.calls is not None:  # a sampler may take more calls than steps
                bar.total = len(sizes) * len(recording.calls.timesteps)
    return kept


def _record(
    pipe: DiffusionPipeline,
    request: Request,
    samples: range,
    prompts: list[str] | None,
    inputs: Inputs | None,
    bar: "tqdm[NoReturn]",
) -> Trajectory:
    with Recorder(pipe.unet, on_call=bar.update) as recorder:
        run_batch(
            pipe,
            seeds=[request.seed + sample for sample in samples],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            prompts=None if prompts is None else prompts[samples.start : samples.stop],
            inputs=inputs,
        )
    return recorder.trajectory()


def _digested(
    inputs: Iterable[Inputs] | None, num_batches: int
) -> Iterator[tuple[Inputs | None, str | None]]:
    """Yield each sample-batch's mapping with its digest; draw no more mappings than there are batches."""
    if inputs is None:
        yield from [(None, None)] * num_batches
        return
    count = 0
    for count, mapping in enumerate(islice(inputs, num_batches), start=1):  # noqa: B007
        if not isinstance(mapping, Mapping):
            raise CalibrationError(f"`inputs` yields {mapping!r}; expected mappings of pipeline arguments")
        yield mapping, value_digest(mapping, name="inputs")
    if count < num_batches:
        raise CalibrationError(_too_few("inputs", count, num_batches, "one mapping per sample-batch"))


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


def check_inputs(inputs: Iterable[Inputs], num_batches: int) -> Iterable[Inputs]:
    """Find out early what can be known of `inputs` without drawing from it.

    Raises:
        CalibrationError: one mapping, or too few of them.
    """
    if isinstance(inputs, Mapping):
        raise CalibrationError("`inputs` is one mapping; pass a list of mappings, one per sample-batch")
    if isinstance(inputs, Sized) and len(inputs) < num_batches:
        raise CalibrationError(_too_few("inputs", len(inputs), num_batches, "one mapping per sample-batch"))
    return inputs


def take_prompts(prompts: Iterable[str], num_samples: int) -> list[str]:
    """Return one text per sample.

    Raises:
        CalibrationError: there are too few, or something is no text.
    """
    if isinstance(prompts, str):
        raise CalibrationError("`prompts` is one text; pass a list with one text per sample")
    texts = list(islice(prompts, num_samples))
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"`prompts` has {text!r}; expected texts")
    if len(texts) < num_samples:
        raise CalibrationError(_too_few("prompts", len(texts), num_samples, "one text per sample"))
    return texts


def _too_few(name: str, count: int, needed: int, rule: str) -> str:
    return f"`{name}` has {count} entries, {needed} are needed ({rule}); give more, or lower num_samples"


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
