"""The metrics against those that papers are measured with: one network, the same images, 1e-3 relative.

Each comparison has a counterexample: a near miss differs by at least ten times the tolerance.
"""

import importlib
import types
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from errata.quality.frechet import frechet_distance, statistics
from errata.quality.inception_score import inception_score
from errata.quality.kid import kernel_distances
from errata.quality.precision_recall import precision_and_recall

RELATIVE = 1e-3
CLEARLY = 10 * RELATIVE
COUNT = 150


class Images(NamedTuple):
    generated: Tensor
    real: Tensor
    other: Tensor


class Scores(nn.Module):
    """What an inception score takes as its network: images to class scores."""

    num_features = 10

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.logits(self.network(images))


@pytest.fixture
def images() -> Images:
    """Smooth random pictures; the real ones are brighter and rougher, the others a little darker."""
    generator = torch.Generator().manual_seed(3)

    def draw(roughness: float, brightness: float) -> Tensor:
        coarse = torch.rand(COUNT, 3, 3, 3, generator=generator).double()
        smooth = nn.functional.interpolate(coarse, (12, 12), mode="bilinear")
        fine = torch.rand(COUNT, 3, 12, 12, generator=generator).double()
        return (smooth + roughness * (fine - 0.5) + brightness).clamp(0, 1)

    return Images(draw(0.2, 0.0), draw(0.5, 0.1), draw(0.2, -0.04))


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def quiet(module: str, kind: str, **options: Any) -> Any:
    """A metric of torchmetrics; some warn at every construction that they keep all features."""
    metric = getattr(importlib.import_module(f"torchmetrics.image.{module}"), kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        return metric(**options).set_dtype(torch.float64)


def test_the_frechet_distance_is_torchmetrics_own(random_features: Any, images: Images) -> None:
    metric = quiet("fid", "FrechetInceptionDistance", feature=random_features)
    metric.update(images.real, real=True)
    metric.update(images.generated, real=False)
    expected = float(metric.compute())
    ours, real, other = (
        statistics(random_features(batch)) for batch in (images.generated, images.real, images.other)
    )
    assert relative(frechet_distance(ours, real), expected) < RELATIVE
    assert relative(frechet_distance(other, real), expected) > CLEARLY


def test_the_frechet_distance_is_torch_fidelitys_own(
    random_features: Any, images: Images, torch_fidelity: types.ModuleType
) -> None:
    fid = importlib.import_module("torch_fidelity.metric_fid")
    features, real = random_features(images.generated), random_features(images.real)
    theirs = [fid.fid_features_to_statistics(batch) for batch in (features, real)]
    expected = fid.fid_statistics_to_metric(*theirs, verbose=False)[torch_fidelity.KEY_METRIC_FID]
    assert relative(frechet_distance(statistics(features), statistics(real)), expected) < RELATIVE
    other = statistics(random_features(images.other))
    assert relative(frechet_distance(other, statistics(real)), expected) > CLEARLY


@pytest.mark.parametrize("count", [20, 257, 2000], ids=["rank deficient", "near singular", "full rank"])
def test_a_set_is_at_no_distance_from_itself(count: int) -> None:
    scales = torch.logspace(0, -6, 256).double()  # variances over twelve decades
    own = statistics(torch.randn(count, 256, dtype=torch.float64) * scales + 1)
    assert frechet_distance(own, own) < 1e-6
    moved = statistics(torch.randn(count, 256, dtype=torch.float64) * scales + 1)
    assert frechet_distance(moved, own) > 1e-5


def biased(x: Tensor, y: Tensor) -> float:
    kernels = [((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    return float(kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean())


def test_the_kernel_distance_is_torchmetrics_own(random_features: Any, images: Images) -> None:
    metric = quiet("kid", "KernelInceptionDistance", feature=random_features, subsets=2, subset_size=COUNT)
    metric.update(images.real, real=True)
    metric.update(images.generated, real=False)
    expected = float(metric.compute()[0])
    features, real = random_features(images.generated), random_features(images.real)
    value = float(kernel_distances(features, real, subsets=2, subset_size=COUNT).mean())
    assert relative(value, expected) < RELATIVE
    assert relative(biased(features, real), expected) > CLEARLY
    other = kernel_distances(random_features(images.other), real, subsets=2, subset_size=COUNT)
    assert relative(float(other.mean()), expected) > CLEARLY


def test_the_kernel_distance_is_torch_fidelitys_own(
    random_features: Any, images: Images, torch_fidelity: types.ModuleType
) -> None:
    kid = importlib.import_module("torch_fidelity.metric_kid")
    features, real = random_features(images.generated), random_features(images.real)
    answer = kid.kid_features_to_metric(features, real, kid_subsets=2, kid_subset_size=COUNT, verbose=False)
    expected = answer[torch_fidelity.KEY_METRIC_KID_MEAN]
    assert relative(float(kernel_distances(features, real, subsets=2).mean()), expected) < RELATIVE
    assert relative(biased(features, real), expected) > CLEARLY


def test_the_inception_score_is_torchmetrics_own(random_features: Any, images: Images) -> None:
    metric = quiet("inception", "InceptionScore", feature=Scores(random_features), splits=1)
    metric.update(images.generated)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="std.*degrees of freedom")  # it also wants one over splits
        expected = float(metric.compute()[0])
    logits = Scores(random_features)(images.generated)
    assert relative(inception_score(logits), expected) < RELATIVE
    assert relative(inception_score(logits, splits=10), expected) > CLEARLY
    assert relative(inception_score(Scores(random_features)(images.real)), expected) > CLEARLY


@pytest.mark.parametrize("splits", [1, 7])
def test_the_inception_score_is_torch_fidelitys_own(
    random_features: Any, images: Images, torch_fidelity: types.ModuleType, splits: int
) -> None:
    isc = importlib.import_module("torch_fidelity.metric_isc")
    logits = Scores(random_features)(images.generated)
    answer = isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
    expected = answer[torch_fidelity.KEY_METRIC_ISC_MEAN]
    assert relative(inception_score(logits, splits=splits), expected) < RELATIVE
    assert relative(inception_score(logits, splits=8 - splits), expected) > CLEARLY


@pytest.mark.parametrize(("neighbours", "wrong"), [(3, 2), (5, 3)])
def test_precision_and_recall_are_torch_fidelitys_own(
    random_features: Any, images: Images, torch_fidelity: types.ModuleType, neighbours: int, wrong: int
) -> None:
    prc = importlib.import_module("torch_fidelity.metric_prc")
    features, real = random_features(images.generated), random_features(images.real[:100])
    answer = prc.prc_features_to_metric(features, real, prc_neighborhood=neighbours, verbose=False)
    expected = [answer[torch_fidelity.KEY_METRIC_PRECISION], answer[torch_fidelity.KEY_METRIC_RECALL]]

    def shares(count: int) -> list[float]:
        pair = precision_and_recall(features, real, neighbours=count, block=64)
        return [float(inside.double().mean()) for inside in pair]

    assert all(relative(*pair) < RELATIVE for pair in zip(shares(neighbours), expected, strict=True))
    assert all(relative(*pair) > CLEARLY for pair in zip(shares(wrong), expected, strict=True))
