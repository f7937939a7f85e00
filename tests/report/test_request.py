"""A report is asked for once, in one validated value; metrics of a user's own go all the way through."""

import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata import cli, quality
from errata.correct import IEC, Plan
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.quality import Measured
from errata.report import Metric, Reference, Report, ReportRequest, SampleSet, Scorer, merge, run
from errata.report.request import chosen_metrics
from errata.report.tables import metric_columns
from errata.report_options import OptionValues, ReportOptions, current_options


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def spread(samples: SampleSet) -> Measured:
    return Measured.mean(torch.cat(list(samples.features())).std(dim=1))


MINE = Metric(
    name="brightness",
    title="Brightness",
    higher_is_better=False,
    needs="images",
    compute=brightness,
    unit="%",
    decimals=3,
    description="mean of all pixels of {samples} images",
)
SPREAD = Metric(
    name="spread",
    title="Spread",
    higher_is_better=True,
    needs="features",
    compute=spread,
    description="mean deviation of the features of {network}",
)


def test_a_request_is_complete_and_frozen(deployed: DeployedPipeline, reference: Reference) -> None:
    request = ReportRequest(artifacts=deployed, plans={}, reference=reference)  # type: ignore[arg-type]
    assert list(request.artifacts) == ["w8a8+deepcache-2"]
    assert list(request.plans) == ["none"]
    assert [metric.name for metric in request.image_metrics] == ["psnr", "ssim"]
    assert request.fingerprint is None
    with pytest.raises(FrozenInstanceError):
        request.samples = 3  # type: ignore[misc]


def test_an_artifact_may_have_plans_of_its_own(deployed: DeployedPipeline, reference: Reference) -> None:
    """A mapping names artifacts, and a bound plan its own: other artifacts get no row of them."""
    other = deployed.clone()
    other.manifest = replace(other.manifest, made_by={"errata": "another"})
    request = ReportRequest(
        artifacts={"a": deployed, "b": other},
        plans={
            "both": Plan(IEC()),
            "mine": {"a": Plan(IEC(iterations=2))},
            "bound": Plan(IEC(step_size=0.3)).bound(other),
        },
        reference=reference,
    )
    assert [(row.artifact, row.plan_name) for row in request.rows()] == [
        *(("a", name) for name in ("none", "both", "mine")),
        *(("b", name) for name in ("none", "both", "bound")),
    ]
    with pytest.raises(ReportError, match="plan 'mine' is for the artifact 'c', and the report has a, b"):
        replace(request, plans={"mine": {"c": Plan(IEC())}})


def test_models_become_metrics() -> None:
    def lpips(images: Tensor, others: Tensor) -> Tensor:
        return (images - others).flatten(1).mean(dim=1)

    (metric,) = Scorer(lpips=lpips).metrics
    assert (metric.name, metric.compute, metric.model, metric.arrow) == ("lpips", lpips, "function", "↓")
    names = [each.name for each in chosen_metrics(Scorer(lpips=lpips), [MINE]) if each.is_per_image]
    assert names == ["psnr", "ssim", "lpips", "brightness"]
    with pytest.raises(ReportError, match="two metrics called 'psnr'; rename yours"):
        chosen_metrics(None, [replace(MINE, name="psnr")])
    with pytest.raises(ReportError, match="metric 'brightness' has no `compute`"):
        chosen_metrics(None, [replace(MINE, compute=None)])


def test_what_the_docstring_of_a_scorer_recommends_can_be_imported() -> None:
    recommended = re.findall(r"errata\.(\w+)\.(\w+)\(", Scorer.__doc__ or "")
    assert recommended == [("quality", "Lpips"), ("quality", "ClipScore")]
    assert all(hasattr(quality, name) and name in quality.__all__ for _, name in recommended)


def test_old_keywords_still_work(deployed: DeployedPipeline, reference: Reference, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="equal_compute is now compute_matched"):
        report = run(
            {"m": deployed}, {}, reference, tmp_path / "r", samples=6, resamples=2, equal_compute=False
        )
    assert [row.plan for row in report.rows] == ["none"]
    with pytest.warns(DeprecationWarning, match=r"Row\.is_rival is now Row\.is_alternative"):
        assert not report.rows[0].is_rival
    with pytest.warns(DeprecationWarning, match=r"Row\.rivals is now Row\.alternatives"):
        assert report.rows[0].rivals == ()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        run({"m": deployed}, {}, reference, tmp_path / "x", sample=6)  # type: ignore[call-arg]
    assert current_options({"seed": 3}) == {"seed": 3}


def test_options_and_their_types_are_one_list() -> None:
    plain = [item.name for item in fields(ReportOptions)]
    assert sorted(plain) == sorted(set(OptionValues.__annotations__) - {"equal_compute"})
    assert set(plain) < {item.name for item in fields(ReportRequest)}
    attributes = (ReportOptions.__doc__ or "").partition("Raises:")[0]
    documented = re.findall(r"^        (\w+): ", attributes, re.MULTILINE)
    assert documented == plain


def test_every_plain_option_is_an_option_of_the_command() -> None:
    words = ["report", "x", "--reference", "r", "--out", "y"]
    parsed = cli.build_parser().parse_args(words)
    for item in fields(ReportOptions):
        assert getattr(parsed, item.name) == item.default
    for flag in ("--no-compute-matched", "--no-equal-compute"):
        assert cli.build_parser().parse_args([*words, flag]).compute_matched is False
    assert cli.build_parser().parse_args([*words, "--shown", "0"]).shown == 0


@pytest.fixture(scope="module")
def measured(
    deployed: DeployedPipeline,
    tiny_pipeline: DDIMPipeline,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("own") / "out"
    report = run(
        {"m": deployed},
        {"all": Plan(IEC(), "all")},
        reference,
        out,
        baseline=tiny_pipeline,
        metrics=[MINE, SPREAD],
        samples=6,
        resamples=2,
        compute_matched=False,
    )
    return report, out


def test_metrics_of_ones_own_are_measured_compared_and_shown(measured: tuple[Report, Path]) -> None:
    report, out = measured
    for row in report.rows:
        assert 0 < row.metrics["brightness"].value < 1
        assert row.metrics["spread"].value > 0
    plain, corrected = report.rows[1:]
    change = corrected.metrics["brightness"].value - plain.metrics["brightness"].value
    assert corrected.changes["brightness"].value == pytest.approx(change)
    columns = {column.name: column for column in metric_columns(report)}
    assert {"Brightness ↓", "Spread ↑"} < set(columns)
    cell = columns["Brightness ↓"].cell(plain)
    assert cell is not None
    assert cell.text == f"{plain.metrics['brightness'].value:.3f} %"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "- Brightness: Mean of all pixels of 6 images" in text
    assert "- Spread: Mean deviation of the features of block-means" in text


def test_merging_needs_the_metrics_that_it_computes(measured: tuple[Report, Path], tmp_path: Path) -> None:
    report, out = measured
    with pytest.raises(ReportError, match="made for the metrics spread, .* give them again: --metric"):
        merge([out], tmp_path / "again")
    again = merge([out], tmp_path / "again", metrics=[SPREAD], resamples=2)
    assert again.rows == report.rows  # what was measured of every image is known by its description
    assert Report.from_json(again.to_json()) == again


def test_a_metric_that_breaks_its_promise_is_found_before_sampling(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    wrong = replace(MINE, compute=lambda images: images.mean())
    with pytest.raises(ReportError, match=r"metric 'brightness' returns \(\) for 2 images"):
        run({"m": deployed}, {}, reference, tmp_path / "r", samples=6, metrics=[wrong])
    assert list(tmp_path.iterdir()) == []


def test_one_list_of_metrics_is_read(
    deployed: DeployedPipeline, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric that a module of `errata.quality` declares is measured without further ado."""
    known = quality.known_metrics()
    monkeypatch.setattr("errata.report.request.known_metrics", lambda: (*known, MINE))
    request = ReportRequest(artifacts={"m": deployed}, plans={}, reference=reference)
    assert [metric.name for metric in request.image_metrics] == ["psnr", "ssim", "brightness"]
