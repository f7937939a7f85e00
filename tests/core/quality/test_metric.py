"""Metrics are all of one kind, and are found where they are declared."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality import Estimate, Interval, Measured, Metric, SampleSet, known_metrics, statistics
from errata.quality.frechet import frechet_distance
from errata.quality.metric import MOST_COMPARED, load_metric

GIVEN: dict[str, Any] = {
    "name": "brightness",
    "title": "Brightness",
    "higher_is_better": True,
    "needs": "images",
    "description": "mean of all pixels, {samples} images",
}


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


MINE = Metric(**GIVEN, compute=brightness)


def sample_set(count: int = 12, **more: Any) -> SampleSet:
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    reference = statistics(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)))
    return SampleSet(features=lambda: iter(features.split(5)), count=count, reference=reference, **more)


def test_all_metrics_of_errata_are_found_per_image_first() -> None:
    names = [metric.name for metric in known_metrics()]
    assert names[:4] == ["psnr", "ssim", "lpips", "clip_score"]
    assert set(names[4:]) == {"frechet", "kid", "precision", "recall", "inception_score"}
    assert [metric.is_per_image for metric in known_metrics()] == [True] * 4 + [False] * 5
    assert [metric.name for metric in known_metrics() if metric.compute is None] == ["lpips", "clip_score"]


def test_a_description_survives_json_without_its_function() -> None:
    value = json.loads(json.dumps(MINE.to_json()))
    assert Metric.from_json(value) == replace(MINE, compute=None)


def test_a_metric_is_described_and_shown() -> None:
    assert MINE.describe(samples=7) == "mean of all pixels, 7 images"
    estimate = Estimate(0.5, Interval(0.4, 0.6))
    assert MINE.show(estimate) == "0.50"
    assert replace(MINE, decimals=1).show_interval(estimate) == "0.4 to 0.6"
    assert replace(MINE, unit="cd", decimals=3).show(estimate) == "0.500 cd"
    assert (MINE.arrow, replace(MINE, higher_is_better=False).arrow) == ("↑", "↓")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "My metric"}, "metric name 'My metric': use lower-case letters"),
        ({"needs": "luck"}, "metric 'brightness' needs 'luck'; allowed are 'images', 'pairs'"),
        ({"description": "of {sample}"}, "cannot be filled in .*; in braces it may name samples, network"),
        ({"description": "an open {"}, "cannot be filled in"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        Metric(**GIVEN | changed)


def test_scores_are_one_number_for_each_image() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(MINE.scores(images), images.mean(dim=(1, 2, 3)))
    paired = replace(MINE, needs="pairs", compute=lambda a, b: (a - b).flatten(1).mean(dim=1))
    assert paired.scores(images, images).tolist() == [0, 0, 0]
    with pytest.raises(
        ReportError, match=r"returns \(3, 1\) for 3 images; it must return one number for each"
    ):
        replace(MINE, compute=lambda images: torch.zeros(3, 1)).scores(images)
    with pytest.raises(ReportError, match="returns float for 3 images"):
        replace(MINE, compute=lambda images: 0.5).scores(images)


def test_a_set_serves_what_it_has() -> None:
    metrics = {metric.name: metric for metric in known_metrics()}
    plain = sample_set()
    assert [name for name, metric in metrics.items() if metric.is_served_by(plain)] == ["frechet"]
    full = sample_set(real=torch.randn(20, 3), logits=lambda: iter([torch.randn(12, 4)]))
    served = [name for name, metric in metrics.items() if metric.is_served_by(full)]
    assert served == ["frechet", "kid", "precision", "recall", "inception_score"]
    for name in served:
        compute = metrics[name].compute
        assert compute is not None
        assert isinstance(compute(full), Measured)


def test_the_headline_is_the_frechet_distance() -> None:
    samples = sample_set(resamples=10)
    metric = next(metric for metric in known_metrics() if metric.name == "frechet")
    assert metric.compute is not None
    found = metric.compute(samples)
    assert found.value == pytest.approx(
        frechet_distance(statistics(torch.cat(list(samples.features()))), samples.reference)
    )
    assert found.replicates is not None
    assert len(found.replicates) == 10


def test_too_few_samples_have_no_precision() -> None:
    metric = next(metric for metric in known_metrics() if metric.name == "precision")
    assert metric.compute is not None
    assert metric.compute(sample_set(3, real=torch.randn(20, 3))) is None


def test_pairs_are_compared_within_bounds() -> None:
    samples = sample_set(MOST_COMPARED + 7)
    assert samples.compared.shape == (MOST_COMPARED, 3)
    assert samples.block >= 1


def test_a_metric_of_the_users_is_loaded_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from errata.quality import Metric\nmine = Metric(**{!r}, compute=lambda images: images)\nother = 3\n"
    )
    (tmp_path / "their_metric.py").write_text(source.format(GIVEN), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_metric("their_metric:mine").name == "brightness"
    with pytest.raises(
        ReportError, match=r"metric `their_metric:other` is a int; it must be an errata\.quality"
    ):
        load_metric("their_metric:other")
    with pytest.raises(ReportError, match="metric `nowhere:x` cannot be imported: ModuleNotFoundError"):
        load_metric("nowhere:x")
    with pytest.raises(ReportError, match="metric `x` cannot be imported"):
        load_metric("x")
