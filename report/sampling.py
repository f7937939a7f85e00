"""Samples the rows of a report batch by batch, and measures the images while they are at hand."""

from __future__ import annotations

import statistics as summary
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.call_timer import CallTimer
from errata.correct.sampling import FloatSampler, Inputs, PlanSampler, Sampled, Sampler
from errata.deploy import DeployedPipeline
from errata.quality.network import device_of, has_logits
from errata.quality.pixels import to_bytes
from errata.quality.reference import Reference
from errata.report.grid import RowSpec
from errata.report.measurements import BatchFacts, BatchMeasured, Measurements
from errata.report.meters import metered
from errata.report.results import FLOAT
from errata.report.scoring import Scorer


class RowSamplers:
    """Makes the sampler of each row; those of one artifact share its weights and its timer."""

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
        """The sampler of a row.

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
    """Measures what is missing of a batch.

    Args:
        samplers: of the rows.
        measurements: where the results go.
        reference: its features are taken of every image.
        scorer: what is measured of single images.
        inputs: what the pipelines are called with; prompts are read from it.
        device: where the pipelines run.
        shown: how many of the first images are kept.
    """

    def __init__(
        self,
        samplers: RowSamplers,
        measurements: Measurements,
        reference: Reference,
        *,
        scorer: Scorer,
        inputs: Inputs,
        device: torch.device,
        shown: int,
    ) -> None:
        self._samplers, self._measurements, self._reference = samplers, measurements, reference
        self._scorer, self._inputs, self._device, self._shown = scorer, inputs, device, shown

    def measure(
        self, rows: Sequence[RowSpec], number: int, *, done: Callable[[int], None] = lambda _: None
    ) -> None:
        """Every row of one batch; the rows of an artifact take turns in being first.

        Images are compared one by one with the float model's, where it is among the rows, else with those of
        the same artifact uncorrected. `done` hears of every batch with its number of images.
        """
        partners: dict[str, Tensor] = {}
        by_artifact = {name: list(group) for name, group in groupby(rows, key=lambda row: row.artifact)}
        plain = {row.artifact: row for row in rows if row.role in ("float", "uncorrected")}
        count = len(self._measurements.batches[number])
        for name, group in by_artifact.items():
            partner = plain.get(FLOAT, plain.get(name))
            for row in _turned(group, number, first=partner):
                if not self._measurements.has(row.directory, number):
                    self._measure(row, number, partner, partners)
                done(count)

    def _measure(
        self, row: RowSpec, number: int, partner: RowSpec | None, partners: dict[str, Tensor]
    ) -> None:
        started = time.perf_counter()
        indices = self._measurements.batches[number]
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
            facts=BatchFacts(
                seconds=sampled.seconds,
                took=time.perf_counter() - started,
                base=sampled.base,
                extra=sampled.extra,
                cost={kind: summary.median(times) for kind, times in sampled.calls.items() if times},
                peak_bytes=reading.peak_bytes,
                joules=reading.joules,
            ),
        )
        self._measurements.write(row.directory, number, measured)

    def _scores(self, sampled: Sampled, indices: range, others: Tensor | None) -> dict[str, Tensor]:
        scores = self._scorer.prompted(sampled.images, self._inputs(indices))
        return scores if others is None else scores | self._scorer.paired(sampled.images, others)

    @torch.inference_mode()
    def _logits(self, features: Tensor) -> Tensor | None:
        network = self._reference.network
        if not has_logits(network):
            return None
        logits: Tensor = network.logits(features.to(device_of(network))).cpu()  # type: ignore[operator]
        return logits


def _turned(group: Iterable[RowSpec], number: int, *, first: RowSpec | None) -> list[RowSpec]:
    """The rows in another order for every batch; the one whose images the others need stays in front."""
    rows = list(group)
    front = [row for row in rows if first is not None and row.key == first.key]
    rest = [row for row in rows if row not in front]
    turn = number % len(rest) if rest else 0
    return [*front, *rest[turn:], *rest[:turn]]
