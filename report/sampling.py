"""Samples the rows of a report batch by batch, and measures the images while they are at hand."""

from __future__ import annotations

import statistics as summary
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.call_timer import CallTimer
from errata.correct.sampling import FloatSampler, Inputs, PlanSampler, Sampled, Sampler
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.machine import Reading, metered
from errata.quality.metric import Metric
from errata.quality.network import device_of, has_logits
from errata.quality.pixels import to_bytes
from errata.quality.reference import Reference
from errata.report.report_index import RowSpec
from errata.report.results import FLOAT
from errata.report.store import BatchFacts, BatchMeasured, MeasurementStore


class RowSamplers:
    """The sampler of each row; samplers of one artifact share its weights and its timer."""

    def __init__(
        self,
        artifacts: Mapping[str, DeployedPipeline],
        baseline: DiffusionPipeline | None,
        *,
        seed: int,
        inputs: Inputs,
    ) -> None:
        self._baseline, self._seed, self._inputs = baseline, seed, inputs
        self._timers = {name: CallTimer() for name in artifacts}
        self._watched = {name: self._timers[name].watch(deployed) for name, deployed in artifacts.items()}
        self._at_steps: dict[tuple[str, int], DeployedPipeline] = {}
        self._made: dict[tuple[str, str], Sampler] = {}

    def of(self, row: RowSpec) -> Sampler:
        """Return the sampler of a row.

        Raises:
            PlanError: the artifact cannot serve the row's plan.
        """
        if row.key not in self._made:
            self._made[row.key] = self._float(row.steps) if row.artifact == FLOAT else self._planned(row)
        return self._made[row.key]

    def _float(self, steps: int) -> Sampler:
        assert self._baseline is not None  # else there is no such row
        return FloatSampler(self._baseline, num_inference_steps=steps, seed=self._seed, inputs=self._inputs)

    def _planned(self, row: RowSpec) -> Sampler:
        assert row.plan is not None  # every row of an artifact has one
        return PlanSampler(
            self._deployed(row.artifact, row.steps),
            row.plan,
            seed=self._seed,
            inputs=self._inputs,
            timer=self._timers[row.artifact],
        )

    def _deployed(self, artifact: str, steps: int) -> DeployedPipeline:
        watched = self._watched[artifact]
        if steps == watched.num_inference_steps:
            return watched
        if (artifact, steps) not in self._at_steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of steps that were not recorded; the row's name says it
                self._at_steps[artifact, steps] = self._timers[artifact].watch_again(watched, steps)
        return self._at_steps[artifact, steps]


class BatchSampler:
    """Measures the rows that a batch lacks.

    Args:
        samplers: of the rows.
        store: where the results go.
        reference: its features are computed of every image.
        metrics: what is measured of single images.
        inputs: the pipelines' keyword arguments; prompts are read from them.
        device: where the pipelines run.
        shown: how many of the first images are kept.
    """

    def __init__(
        self,
        samplers: RowSamplers,
        store: MeasurementStore,
        reference: Reference,
        *,
        metrics: Sequence[Metric],
        inputs: Inputs,
        device: torch.device,
        shown: int,
    ) -> None:
        self._samplers, self._store, self._reference = samplers, store, reference
        self._metrics, self._inputs, self._device, self._shown = metrics, inputs, device, shown

    def warm_up(self, row: RowSpec, *, images: int = 1) -> None:
        """Sample one image or so, so that the first batch is not slowed down by what happens once."""
        self._samplers.of(row).sample(range(images))

    def measure(
        self, rows: Sequence[RowSpec], number: int, *, done: Callable[[int], None] = lambda _: None
    ) -> None:
        """Measure one batch of every row; the rows of an artifact take turns in being first.

        Images are compared one by one with the float model's, if it is among the rows, else with those of the
        same artifact uncorrected. `done` is called with the number of images after each row.
        """
        partners: dict[str, Tensor] = {}
        by_artifact = {name: list(group) for name, group in groupby(rows, key=lambda row: row.artifact)}
        plain = {row.artifact: row for row in rows if row.role in ("float", "uncorrected")}
        count = len(self._store.batches[number])
        for name, group in by_artifact.items():
            partner = plain.get(FLOAT, plain.get(name))
            for row in _turned(group, number, first=partner):
                if not self._store.has(row.directory, number):
                    self._measure(row, number, partner, partners)
                done(count)

    def _measure(
        self, row: RowSpec, number: int, partner: RowSpec | None, partners: dict[str, Tensor]
    ) -> None:
        started = time.perf_counter()
        indices = self._store.batches[number]
        if partner is not None and partner.key != row.key and partner.artifact not in partners:
            partners[partner.artifact] = self._samplers.of(partner).sample(indices).images
            started = time.perf_counter()
        with metered(self._device) as reading:
            sampled = self._samplers.of(row).sample(indices)
        if partner is not None and partner.key == row.key:
            partners[row.artifact] = sampled.images
        others = None if partner is None or partner.key == row.key else partners[partner.artifact]
        features = self._reference.features(sampled.images).float()
        measured = BatchMeasured(
            features=features,
            logits=self._logits(features),
            scores=self._scores(sampled, indices, others),
            shown=to_bytes(sampled.images[: max(0, self._shown - indices.start)]),
            facts=_facts(sampled, reading, took=time.perf_counter() - started),
        )
        self._store.write(row.directory, number, measured)

    def _scores(self, sampled: Sampled, indices: range, others: Tensor | None) -> dict[str, Tensor]:
        scores = {}
        for metric in self._metrics:
            second: Any = others
            if metric.needs == "prompts":
                second = prompts_of(metric, self._inputs(indices), len(indices))
            if metric.needs != "pairs" or others is not None:
                scores[metric.name] = metric.scores(sampled.images, second)
        return scores

    @torch.inference_mode()
    def _logits(self, features: Tensor) -> Tensor | None:
        network = self._reference.network
        if not has_logits(network):
            return None
        logits: Tensor = network.logits(features.to(device_of(network))).cpu()  # type: ignore[operator]
        return logits


def _facts(sampled: Sampled, reading: Reading, *, took: float) -> BatchFacts:
    return BatchFacts(
        seconds=sampled.seconds,
        took=took,
        base=sampled.base,
        extra=sampled.extra,
        cost={kind: summary.median(times) for kind, times in sampled.calls.items() if times},
        peak_bytes=reading.peak_bytes,
        joules=reading.joules,
    )


def _turned(group: Iterable[RowSpec], number: int, *, first: RowSpec | None) -> list[RowSpec]:
    """Return the rows in another order for each batch; the one whose images the others need stays first."""
    rows = list(group)
    front = [row for row in rows if first is not None and row.key == first.key]
    rest = [row for row in rows if row not in front]
    turn = number % len(rest) if rest else 0
    return [*front, *rest[turn:], *rest[:turn]]


def check_images(reference: Reference, metrics: Sequence[Metric], pipes: Sequence[Any]) -> None:
    """Check, without sampling, that the feature network and the metrics take images of the pipelines' size.

    Raises:
        ReportError: one does not or is not installed, the features do not fit the reference, or the pipelines
            make images of several sizes.
    """
    sizes = {image_size(pipe) for pipe in pipes} - {None}
    if len(sizes) > 1:
        raise ReportError(
            f"the artifacts make images of several sizes, {sorted(map(str, sizes))} (height, width, "
            "channels); make one report for each size"
        )
    for height, width, channels in filter(None, sizes):
        noise = torch.rand(2, channels, height, width)
        reference.features(noise)
        for metric in metrics:
            if metric.needs != "prompts":
                metric.scores(noise, noise.flip(0))


def image_size(pipe: Any) -> tuple[int, int, int] | None:
    """Return height, width and channels of a pipeline's default images; None if it does not say."""
    size = getattr(pipe.unet.config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if decoder is None:
        return height, width, int(pipe.unet.config.out_channels)
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    return height * factor, width * factor, int(decoder.config.out_channels)


def prompts_of(metric: Metric, arguments: Mapping[str, Any], count: int) -> list[str]:
    """Return the prompt of each image of a pipeline call.

    Raises:
        ReportError: there is not one for each.
    """
    prompt = arguments.get("prompt")
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt or ())
    if len(prompts) != count or not all(isinstance(each, str) for each in prompts):
        raise ReportError(
            f"metric {metric.name!r} needs a prompt for each of {count} images, but the pipeline is called "
            f"with {len(prompts)}; give prompts, or leave the metric out"
        )
    return prompts
