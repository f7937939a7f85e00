"""How a report was measured: the part of its schema that tells with what it is comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

import torch

from errata.deploy import DeployedPipeline
from errata.machine import describe_machine, versions
from errata.quality.metric import MOST_COMPARED, Metric
from errata.quality.network import has_logits
from errata.quality.reference import Reference
from errata.report.verdict import rank_warning


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes on disk: of the weights as stored, of the same weights in float32, of the whole directory."""

    weights: int
    float32: int
    directory: int

    @property
    def ratio(self) -> float:
        """Stored weights as a fraction of their float32 size."""
        return self.weights / self.float32


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a report was measured; compare two reports only where this agrees.

    Attributes:
        samples: images per row.
        seed: image i starts from a generator seeded `seed + i`, in every row.
        steps: sampling steps.
        image_size: height, width and channels.
        feature_network: its name; the metric is "Fréchet distance in `feature_network`".
        feature_digest: SHA-256 of its weights.
        reference_count: number of real images; 0 if the statistics do not say.
        resamples: bootstrap resamples per interval.
        notes: caveats that a reader should know.
        paired_with: whose images single images are compared with, "float" or "uncorrected".
        real_compared: real images whose features are kept for kernel distance, precision and recall.
        facts: further facts, by name; those of a metric under its name.
        promised_seconds: denoiser calls of all rows at their measured costs.
        sampling_seconds: what sampling and measuring took, in the processes that did it.
    """

    samples: int
    seed: int
    batch_size: int
    steps: int
    image_size: tuple[int, int, int]
    feature_network: str
    feature_digest: str
    feature_dimension: int
    reference: str
    reference_count: int
    resamples: int
    machine: str
    device: str
    threads: int
    versions: Mapping[str, str]
    date: str
    command: str
    notes: tuple[str, ...] = ()
    paired_with: str = "float"
    facts: Mapping[str, str] = field(default_factory=dict)
    real_compared: int = 0
    promised_seconds: float | None = None
    sampling_seconds: float | None = None

    def finished(
        self,
        *,
        resamples: int,
        command: str | None,
        notes: tuple[str, ...],
        promised_seconds: float,
        sampling_seconds: float,
    ) -> Protocol:
        """Return the same protocol with what is known at the end."""
        return replace(
            self,
            resamples=resamples,
            promised_seconds=promised_seconds,
            command=self.command if command is None else command,
            notes=self.notes + notes,
            sampling_seconds=sampling_seconds,
        )

    @property
    def metric(self) -> str:
        """Full name of the headline metric."""
        return f"Fréchet distance in {self.feature_network}"

    @property
    def pairs(self) -> str:
        """What single images are compared with, in a word."""
        return "float" if self.paired_with == "float" else "uncorrected"

    def describe(self, metric: Metric) -> str:
        """Return how a metric was measured."""
        shown = min(self.samples, MOST_COMPARED)
        other = "the float model's image" if self.pairs == "float" else "the uncorrected image"
        text = metric.describe(
            samples=self.samples,
            network=self.feature_network,
            pairs=f"mean over {self.samples} images, each against {other} from the same noise, at full size",
            real=f"in the features of {self.feature_network}, {shown} images against {self.real_compared} "
            "real ones",
        )
        return text[:1].upper() + text[1:]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return asdict(self) | {"image_size": list(self.image_size), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Protocol:
        """Read what `to_json` returned."""
        known = {item.name: value[item.name] for item in fields(cls) if item.name in value}
        return cls(**known | {"image_size": tuple(known["image_size"]), "notes": tuple(known["notes"])})


def make_protocol(
    deployed: DeployedPipeline,
    reference: Reference,
    *,
    samples: int,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int, int],
    paired_with: str,
    facts: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> Protocol:
    """Return the protocol of a measurement that begins now, on this machine."""
    return Protocol(
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        steps=deployed.num_inference_steps,
        image_size=image_size,
        feature_network=reference.name,
        feature_digest=reference.digest,
        feature_dimension=reference.statistics.dimension,
        reference=reference.source,
        reference_count=reference.statistics.count,
        real_compared=0 if reference.real is None else len(reference.real),
        resamples=0,
        machine=describe_machine(),
        device=str(deployed.pipe.device),
        threads=torch.get_num_threads(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command="",
        paired_with=paired_with,
        facts=facts,
        notes=notes,
    )


def protocol_lines(p: Protocol) -> list[tuple[str, str]]:
    """Return the protocol as pairs of name and text."""
    height, width, channels = p.image_size
    packages = ", ".join(f"{name} {version}" for name, version in sorted(p.versions.items()))
    reference = f"{p.reference_count} images" if p.reference_count else "an unknown number of images"
    lines = [
        (
            "Metric",
            f"{p.metric} ({p.feature_dimension} features; lower is better; comparable only with itself)",
        ),
        ("Feature network", f"{p.feature_network}, weights SHA-256 {p.feature_digest}"),
        ("Reference", f"{p.reference}; {reference}"),
        (
            "Samples",
            f"{p.samples} per row, seeds {p.seed} to {p.seed + p.samples - 1}, the same for every row",
        ),
        (
            "Images",
            f"{width}×{height}, {channels} channel{'s' * (channels > 1)}, float32 in [0, 1], not resized",
        ),
        ("Sampling", f"{p.steps} steps, batches of {p.batch_size}"),
        ("Intervals", f"95 %, bootstrap with {p.resamples} resamples; differences resample both sides alike"),
        ("Machine", f"{p.machine}; device {p.device}, {p.threads} thread{'s' * (p.threads > 1)}"),
        ("Versions", packages),
        ("Date", p.date),
        ("Command", p.command),
    ]
    return [(name, text) for name, text in lines if text]


def size_of(deployed: DeployedPipeline) -> Size:
    """Return the bytes of the denoiser's weights as stored and in float32, and of the whole artifact."""
    manifest = deployed.manifest
    return Size(
        weights=manifest.denoiser_bytes,
        float32=manifest.float32_weight_bytes,
        directory=manifest.artifact_bytes,
    )


def kernels_of(deployed: DeployedPipeline) -> dict[str, int]:
    """Return how many layers run on each kernel; empty where nothing is quantized."""
    return dict(Counter(row.backend for row in deployed.backend_report() if row.kind != "calls"))


def rank_notes(samples: int, reference: Reference) -> tuple[str, ...]:
    """Return what is wrong with these numbers of images."""
    dimension = reference.statistics.dimension
    notes = []
    if warning := rank_warning(samples=samples, dimension=dimension):
        notes.append(warning)
    if shortfall := reference.rank_shortfall:
        notes.append(shortfall)
    return tuple(notes)


def missing_notes(reference: Reference) -> tuple[str, ...]:
    """Return which metrics the reference or its network cannot serve."""
    notes = []
    if reference.real is None:
        notes.append(
            f"No KID, precision and recall: {reference.source} holds statistics without the features of the "
            "real images. Use the images as --reference, or a file that `errata report --save-stats` wrote."
        )
    if not has_logits(reference.network):
        notes.append(f"No inception score: {reference.name} returns no class scores.")
    return tuple(notes)


def exception_notes(artifacts: Mapping[str, DeployedPipeline]) -> tuple[str, ...]:
    """Return the layers that each recipe leaves out or treats differently; no note where it has none."""
    notes = []
    for name, deployed in artifacts.items():
        quantization = deployed.manifest.recipe.quantization
        if quantization is not None and (exceptions := quantization.exceptions()):
            notes.append(f"{name}: {exceptions}.")
    return tuple(notes)
