import pytest
import torch

from errata.correct.planner.metrics import AgreementMetric, FrechetMetric
from errata.correct.planner.planning import CACHE_FREE
from errata.correct.plans import Plan
from errata.correct.sampling import PlanSampler, Sampled, default_inputs
from errata.deploy import DeployedPipeline
from errata.quality import Reference, frechet_distance, statistics


class Grey:
    """A sampler of grey images."""

    def sample(self, indices: range) -> Sampled:
        return Sampled(images=torch.full((len(indices), 1, 2, 2), 0.5), seconds=0.0, base={}, extra={})


def test_agreement_is_the_mean_of_each_images_rms() -> None:
    metric = AgreementMetric(Grey(), reference=CACHE_FREE)
    score = metric.against(range(2))
    images = torch.full((2, 1, 2, 2), 0.5)
    images[0, 0, 0, 0] += 0.4  # root of 0.16 / 4
    images[1] -= 0.1
    kept = score(images)
    torch.testing.assert_close(kept, torch.tensor([[0.2], [0.1]]).double(), rtol=1e-6, atol=0)
    assert metric.value(kept) == pytest.approx(0.15)
    assert metric.estimate(kept).value == pytest.approx(0.15)
    assert metric.change(kept, 2 * kept).value == pytest.approx(-0.15)
    assert metric.change(kept, kept + 0.01).interval.excludes_zero


def test_frechet_is_that_of_the_features(deployed: DeployedPipeline, reference: Reference) -> None:
    metric = FrechetMetric(reference, seed=0)
    images = PlanSampler(deployed, Plan.none(), seed=0, inputs=default_inputs).sample(range(30)).images
    kept = metric.against(range(30))(images)
    assert torch.equal(kept, reference.features(images))
    assert metric.value(kept) == frechet_distance(statistics(kept), reference.statistics)
    estimate = metric.estimate(kept)
    assert estimate.interval.low < estimate.value < estimate.interval.high
    change = metric.change(kept, kept + 1.0)
    assert change.value == pytest.approx(metric.value(kept) - metric.value(kept + 1.0))
    assert change.interval.high < 0


def test_a_projection_of_all_images_is_the_value(reference: Reference) -> None:
    metric = FrechetMetric(reference, seed=0)
    plain = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).double()
    kept = 0.9 * plain + 0.1
    assert metric.projected(kept, plain) == pytest.approx(metric.value(kept), rel=1e-9)
    grey = AgreementMetric(Grey(), reference=CACHE_FREE)
    assert grey.projected(kept, plain) == grey.value(kept)


def test_a_projection_is_nearer_to_all_images_than_the_first_ones_are(reference: Reference) -> None:
    metric = FrechetMetric(reference, seed=0)
    errors: dict[str, float] = {"projected": 0.0, "first ones": 0.0}
    for seed in range(20):
        plain = torch.rand(256, 4, generator=torch.Generator().manual_seed(seed)).double()
        kept = 0.95 * plain + 0.05
        truth = metric.value(kept)
        errors["projected"] += abs(metric.projected(kept[:16], plain) - truth)
        errors["first ones"] += abs(metric.value(kept[:16]) - truth)
    assert 5 * errors["projected"] < errors["first ones"]
