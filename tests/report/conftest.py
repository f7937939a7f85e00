"""A tiny artifact with quantized layers and a cache, made by the real stages, and features to judge it in."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from plain_outputs import plain_outputs
from torch import Tensor, nn

from errata import calibration, compress, deploy
from errata.deploy import DeployedPipeline
from errata.report import (
    Estimate,
    Interval,
    Overhead,
    Protocol,
    Reference,
    Report,
    Row,
    Size,
    statistics,
)
from errata.report.image_grid import strip
from errata.report.render import html
from errata.report.results import ComputeMatchedResult, Role
from errata.report.verdict import Verdict, VerdictKind


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class BlockMeans(nn.Module):
    """Four block means of a grey image as its features."""

    name = "block-means"
    channels = 1

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


# `BlockMeans` as a module of a user's.
FOUR_MEANS = """
from torch import nn

class FourMeans(nn.Module):
    name, channels = "block-means", 1

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
"""


@pytest.fixture(scope="session")
def exported(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w8a8+deepcache-2` of the tiny pipeline at four steps: steps 0 and 2 are full.

    Beside it lie `reference.npz` and `four_means.py`, for programs that know no fixtures.
    """
    folder = tmp_path_factory.mktemp("artifact")
    trajectories = calibration.collect(
        tiny_pipeline, folder / "trajectories", num_inference_steps=4, num_samples=4, batch_size=4
    )
    with plain_outputs():
        compressed = compress.apply(tiny_pipeline, trajectories, "w8a8+deepcache-2", folder / "compressed")
    (folder / "four_means.py").write_text(FOUR_MEANS, encoding="utf-8")
    real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    network = BlockMeans()
    Reference(network, statistics(network(real)), "random images", network.name).save(
        folder / "reference.npz"
    )
    return deploy.export(compressed, folder / "artifact")


@pytest.fixture(scope="session")
def deployed(exported: Path) -> DeployedPipeline:
    """The artifact, loaded."""
    return deploy.load(exported, device="cpu")


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Random images in block means."""
    network = BlockMeans()
    real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Reference(network, statistics(network(real)), "random images", network.name)


def _estimate(value: float, half: float) -> Estimate:
    return Estimate(value, Interval(value - half, value + half))


def _row(artifact: str, plan: str, role: Role, compute: float, distance: float, kind: VerdictKind) -> Row:
    """A row whose numbers all differ, so that every column has an order."""
    is_compared = role in ("plan", "equal compute") and artifact != "float"
    base = 0.010
    return Row(
        artifact=artifact,
        plan=plan,
        role=role,
        stands_for=f"no correction, {plan}" if role == "equal compute" else "",
        steps="all",
        sampling_steps=round(distance),
        samples=256,
        evaluations={"full": 1e3 * compute},
        compute=compute,
        seconds_per_image=1.1 * compute,
        frechet=_estimate(distance, 0.4),
        verdict=Verdict(kind, f"{kind}: a sentence about {plan}."),
        overhead=None
        if artifact == "float"
        else Overhead(defined=compute / base - 1, measured=compute / base - 0.98, spread=(0, 1), batches=4),
        change=_estimate(distance - 12, 0.5) if is_compared else None,
        metrics=({} if role == "float" else {"psnr": _estimate(20 + distance, 0.3)})
        | {"kid": _estimate(distance / 100, 0.01), "recall": _estimate(1 - distance / 100, 0.01)},
        changes={"psnr": _estimate(distance - 12, 0.3), "kid": _estimate(distance / 100 - 0.12, 0.01)}
        if is_compared
        else {},
        front="on" if distance < 9 else "near" if distance < 11 else "off",
        peak_bytes=int(1e9 * compute),
        joules_per_image=10 * compute,
    )


def _alternatives_of(row: Row, others: Sequence[Row]) -> tuple[ComputeMatchedResult, ...]:
    return tuple(
        ComputeMatchedResult(
            artifact=other.artifact,
            plan=other.plan,
            compute=other.compute / row.compute,
            difference=_estimate(row.frechet.value - other.frechet.value, 0.5),
        )
        for other in others
    )


@pytest.fixture(scope="session")
def full_report() -> Report:
    """A report with everything that one can hold, of invented numbers."""
    float_rows = [
        _row("float", "none", "float", 0.030, 6.0, "float"),
        _row("float", "8 steps", "equal compute", 0.012, 9.5, "equal compute"),
    ]
    plain = _row("w8a8", "none", "uncorrected", 0.010, 12.0, "uncorrected")
    alternative = _row("w8a8", "14 steps", "equal compute", 0.014, 10.5, "equal compute")
    others = [plain, alternative, float_rows[1]]
    good, bad = (
        _row("w8a8", "ends", "plan", 0.014, 8.0, "pays"),
        _row("w8a8", "all", "plan", 0.020, 13.0, "does not pay"),
    )
    plans = [replace(row, alternatives=_alternatives_of(row, others)) for row in (good, bad)]
    growth = {
        "timesteps": [900, 500, 100],
        "relative": {"ends": [0.01, 0.03, 0.05], "uncorrected": [0.02, 0.05, 0.2]},
        "samples": 8,
        "amplification": {
            "asked": "0,2",
            "steps": [0, 2],
            "jacobian": [1.1, 1.3],
            "iteration": [0.7, 0.6],
            "step_size": 0.5,
            "samples": 2,
            "is_bound": False,
        },
    }
    return Report(
        rows=(*float_rows, plain, *plans, alternative),
        protocol=_protocol(),
        sizes={"w8a8": Size(weights=1_000_000, float32=4_000_000, directory=1_010_000)},
        costs={"float": {"full": 0.12}, "w8a8": {"full": 0.06, "cached": 0.02}},
        growth={"w8a8": growth},
    )


def _protocol() -> Protocol:
    return Protocol(
        samples=256,
        seed=5,
        batch_size=64,
        steps=25,
        image_size=(16, 16, 3),
        feature_network="block-means",
        feature_digest="ab" * 32,
        feature_dimension=4,
        reference="random images",
        reference_count=1797,
        resamples=200,
        machine="a machine",
        device="cpu",
        threads=2,
        versions={"errata": "0.1.0"},
        date="2026-01-02T03:04:05+00:00",
        command="errata report runs/artifact --reference embedded",
        facts={"kid": "a fact of this run"},
    )


@pytest.fixture(scope="session")
def full_page(full_report: Report) -> str:
    """Its page, with four random images a row."""
    generator = torch.Generator().manual_seed(0)
    strips = {
        (row.artifact, row.plan): strip(torch.rand(4, 3, 16, 16, generator=generator))
        for row in full_report.rows
    }
    return html(full_report, strips)
