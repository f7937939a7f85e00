"""What a report says of itself: sizes, kernels, protocol, and what to know before trusting the numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch

from errata.deploy import DeployedPipeline
from errata.quality.network import has_logits
from errata.quality.reference import Reference
from errata.report.machine import describe_machine, versions
from errata.report.protocol import Protocol
from errata.report.results import Overhead, Row, Size
from errata.report.verdict import rank_warning

# Quartiles of wall-clock ratios on a quiet machine lie a few per cent apart; ten mean that something else
# was running.
_CALM_SPREAD = 0.10


def size_of(deployed: DeployedPipeline) -> Size:
    """Bytes of the denoiser's weights as stored and in float32, and of the whole artifact."""
    manifest = deployed.manifest
    return Size(
        weights=manifest.denoiser_bytes,
        float32=manifest.float32_weight_bytes,
        directory=manifest.artifact_bytes,
    )


def kernels_of(deployed: DeployedPipeline) -> dict[str, int]:
    """How many layers run on each kernel; empty where nothing is quantized."""
    return dict(Counter(row.backend for row in deployed.backend_report()))


def rank_notes(samples: int, reference: Reference) -> tuple[str, ...]:
    """What is wrong with these sample counts, as notes; warns of each."""
    dimension = reference.statistics.dimension
    notes = []
    if warning := rank_warning(samples=samples, dimension=dimension):
        notes.append(warning)
    if shortfall := reference.rank_shortfall:
        notes.append(shortfall)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return tuple(notes)


def missing_notes(reference: Reference) -> tuple[str, ...]:
    """What is not measured for want of something in the reference or its network."""
    notes = []
    if reference.real is None:
        notes.append(
            f"No kernel distance, precision and recall: {reference.source} holds statistics without the "
            "features of the real images; give the images, or what `errata report --save-stats` makes of "
            "them."
        )
    if not has_logits(reference.network):
        notes.append(f"No inception score: {reference.name} gives no class scores.")
    return tuple(notes)


def scatter_notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """A note where wall-clock times scatter so much that the measured overheads mean little."""
    scattered = [
        f"{row.artifact}, {row.plan}"
        for row in rows
        if row.overhead is not None and _relative_spread(row.overhead) > _CALM_SPREAD
    ]
    if not scattered:
        return ()
    return (
        f"The machine was busy: the measured overhead of {'; '.join(scattered)} scatters by more than "
        f"{_CALM_SPREAD:.0%} of the run between batches. Trust the overhead as defined there.",
    )


def exception_notes(artifacts: Mapping[str, DeployedPipeline]) -> tuple[str, ...]:
    """What each recipe spares or treats otherwise, layer by layer; no note where it says nothing."""
    notes = []
    for name, deployed in artifacts.items():
        quantization = deployed.manifest.recipe.quantization
        if quantization is not None and (exceptions := quantization.exceptions()):
            notes.append(f"{name}: {exceptions}.")
    return tuple(notes)


def _relative_spread(overhead: Overhead) -> float:
    low, high = overhead.spread
    return (high - low) / (1 + overhead.measured)


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
    """The protocol of a measurement that begins now, on this machine."""
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
