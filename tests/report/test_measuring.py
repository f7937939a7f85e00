import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

from errata.correct import IEC, Forecast, Hindsight, Plan, Refresh, wrap
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, PlanError, ReportError
from errata.report import Reference, Report, frechet_distance, psnr, run, statistics, text_table
from errata.report.request import with_uncorrected
from errata.report.tables import metric_lines

PLANS = {"none": Plan.none(), "first": Plan(IEC(), "first:1"), "all": Plan(IEC(), "all")}
SAMPLES = 10


@pytest.fixture(scope="module")
def measured(
    deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path, Reference]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    features = statistics(network(torch.rand(50, 1, 8, 8)))
    reference = Reference(network, features, "random images", "block-means")
    out = tmp_path_factory.mktemp("report") / "report"
    report = run(
        deployed,
        PLANS,
        reference,
        out,
        samples=SAMPLES,
        batch_size=4,
        seed=7,
        baseline=tiny_pipeline,
        compute_matched=False,
        resamples=20,
        shown=3,
    )
    return report, out, reference


def sample_alone(pipeline: object, index: int) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(7 + index)]
    images = pipeline(batch_size=1, generator=generator, output_type="np").images  # type: ignore[operator]
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_there_is_a_row_for_each_plan_and_the_float_model(measured: tuple[Report, Path, Reference]) -> None:
    report, _, _ = measured
    keys = [(row.artifact, row.plan) for row in report.rows]
    assert keys == [("float", "none"), *(("w8a8+deepcache-2", plan) for plan in PLANS)]
    assert [row.samples for row in report.rows] == [SAMPLES] * 4


def test_evaluations_are_those_of_the_plan(measured: tuple[Report, Path, Reference]) -> None:
    report, _, _ = measured
    assert [dict(row.evaluations) for row in report.rows] == [
        {"full": 4.0},
        {"full": 2.0, "cached": 2.0},
        {"full": 3.0, "cached": 2.0},
        {"full": 4.0, "cached": 2.0},
    ]


def test_overhead_follows_its_definition(measured: tuple[Report, Path, Reference]) -> None:
    report, _, _ = measured
    full, cached = (report.costs["w8a8+deepcache-2"][kind] for kind in ("full", "cached"))
    overheads = [row.overhead for row in report.rows[1:]]
    assert all(overhead is not None and overhead.batches == 3 for overhead in overheads)
    defined = [overhead.defined for overhead in overheads if overhead is not None]
    assert defined == pytest.approx([0.0, full / (2 * full + 2 * cached), full / (full + cached)])
    assert overheads[0] is not None
    assert overheads[0].measured == 0.0


def test_distance_is_that_of_images_sampled_alone_from_the_same_seeds(
    measured: tuple[Report, Path, Reference], deployed: DeployedPipeline
) -> None:
    report, _, reference = measured
    corrected = wrap(deployed, PLANS["all"])
    for row, pipeline in ((report.rows[1], deployed), (report.rows[3], corrected)):
        images = torch.cat([sample_alone(pipeline, index) for index in range(SAMPLES)])
        alone = frechet_distance(statistics(reference.features(images)), reference.statistics)
        assert row.frechet.value == pytest.approx(alone, rel=2e-2)


def test_psnr_compares_images_of_the_same_seed(
    measured: tuple[Report, Path, Reference], deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline
) -> None:
    report, _, _ = measured

    def sample_float(**options: object) -> object:
        return tiny_pipeline(num_inference_steps=4, **options)

    alone = [
        psnr(sample_alone(deployed, index), sample_alone(sample_float, index)) for index in range(SAMPLES)
    ]
    assert report.rows[1].psnr is not None
    assert report.rows[1].psnr.value == pytest.approx(float(torch.cat(alone).mean()), rel=1e-2)


def test_changes_are_differences_of_the_rows(measured: tuple[Report, Path, Reference]) -> None:
    report, _, _ = measured
    float_row, plain, *corrected = report.rows
    assert (plain.change, plain.psnr_change, float_row.psnr) == (None, None, None)
    for row in corrected:
        assert row.change is not None
        assert row.psnr_change is not None
        assert row.change_to_float is not None
        assert row.psnr is not None
        assert plain.psnr is not None
        assert row.change.value == pytest.approx(row.frechet.value - plain.frechet.value)
        assert row.change_to_float.value == pytest.approx(row.frechet.value - float_row.frechet.value)
        assert row.psnr_change.value == pytest.approx(row.psnr.value - plain.psnr.value)


def test_json_is_the_report(measured: tuple[Report, Path, Reference]) -> None:
    report, out, _ = measured
    assert sorted(file.name for file in out.iterdir()) == [
        "measurements",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8"))) == report
    assert report.sizes["w8a8+deepcache-2"].ratio < 0.5
    assert sum(report.backends["w8a8+deepcache-2"].values()) > 5
    assert report.protocol.image_size == (8, 8, 1)
    assert report.protocol.seed == 7


def test_the_pipelines_are_left_as_they_were(
    deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline, reference: Reference, tmp_path: Path
) -> None:
    before = copy.deepcopy((tiny_pipeline.scheduler.__dict__, tiny_pipeline._progress_bar_config))
    shown = deployed.pipe._progress_bar_config if hasattr(deployed.pipe, "_progress_bar_config") else None
    run(deployed, {}, reference, tmp_path / "r", samples=6, baseline=tiny_pipeline, resamples=2)
    after = (tiny_pipeline.scheduler.__dict__, tiny_pipeline._progress_bar_config)
    assert str(before) == str(after)
    assert getattr(deployed.pipe, "_progress_bar_config", None) == shown


def test_an_uncorrected_run_is_always_measured(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    plans = {"all": Plan(IEC(), "all")}
    options = {"samples": 6, "batch_size": 6, "resamples": 2, "compute_matched": False}
    report = run({"mine": deployed}, plans, reference, tmp_path / "r", **options)  # type: ignore[arg-type]
    assert [(row.artifact, row.plan) for row in report.rows] == [("mine", "none"), ("mine", "all")]
    assert report.rows[1].overhead is not None
    assert report.rows[1].overhead.batches == 1


def test_too_few_samples_for_the_features_are_told(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="4 samples cannot give a covariance of full rank in 4 features"):
        report = run(deployed, {}, reference, tmp_path / "r", samples=4, resamples=2)
    assert "use at least 5" in report.protocol.notes[0]
    assert text_table(report).splitlines()[-1] == f"Too few samples: {report.protocol.notes[0]}"
    assert f"Too few samples: {report.protocol.notes[0]}" in (tmp_path / "r" / "report.md").read_text("utf-8")


def test_images_are_compared_with_uncorrected_ones_where_there_is_no_float_model(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    options = {"samples": 6, "batch_size": 6, "seed": 7, "resamples": 2, "compute_matched": False}
    report = run({"mine": deployed}, PLANS, reference, tmp_path / "r", **options)  # type: ignore[arg-type]
    assert report.protocol.paired_with == "uncorrected"
    assert report.rows[0].psnr is None
    corrected = wrap(deployed, PLANS["all"])
    alone = [psnr(sample_alone(corrected, index), sample_alone(deployed, index)) for index in range(6)]
    assert report.rows[2].psnr is not None
    assert report.rows[2].psnr.value == pytest.approx(float(torch.cat(alone).mean()), rel=1e-2)
    assert report.rows[2].psnr_change is None
    assert 0 < report.rows[2].metrics["ssim"].value < 1


def test_bad_requests_are_refused_before_anything_is_written(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    def refused(match: str, artifacts: object = deployed, **options: object) -> None:
        with pytest.raises(ReportError, match=match):
            run(artifacts, {}, reference, tmp_path / "r", **options)  # type: ignore[arg-type]

    refused("samples=1; it must be at least 2", samples=1)
    refused("batch_size=0", batch_size=0)
    with pytest.raises(PlanError, match="'99' reaches step 99"):
        run(deployed, {}, reference, tmp_path / "r", amplification="99")
    refused("resamples=1", resamples=1)
    refused("no artifact to report on", {})
    refused("names the float model's row", {"float": deployed})
    with pytest.raises(TypeError, match="got a str"):
        run("artifact", {}, reference, tmp_path / "r")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_the_artifact_cannot_serve_leaves_nothing(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="leaves nothing to correct"):
        run(deployed, {"cached": Plan(IEC(), "1")}, reference, tmp_path / "r", samples=6)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ReportError, match="exists and is not empty"):
        run(deployed, {}, reference, tmp_path, samples=6)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_features_of_another_dimension_are_found_before_sampling(
    deployed: DeployedPipeline, tmp_path: Path
) -> None:
    network = torch.nn.Flatten()
    reference = Reference(network, statistics(torch.randn(90, 4)), "a file", "pixels")
    with pytest.raises(ReportError, match=r"features of shape \(2, 64\).*a file have dimension 4"):
        run(deployed, {}, reference, tmp_path / "r", samples=6)
    assert list(tmp_path.iterdir()) == []


def test_with_uncorrected_knows_which_plan_corrects_nothing() -> None:
    everything = Plan(IEC(), "all")
    assert list(with_uncorrected({"all": everything})) == ["none", "all"]
    assert list(with_uncorrected({"all": everything, "plain": Plan.none()})) == ["plain", "all"]
    with pytest.raises(ReportError, match="all correct nothing"):
        with_uncorrected({"a": Plan.none(), "b": Plan.none()})
    with pytest.raises(ReportError, match="give it another name"):
        with_uncorrected({"none": everything})


def test_a_baseline_of_another_model_is_refused(
    deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline, reference: Reference, tmp_path: Path
) -> None:
    other = copy.deepcopy(tiny_pipeline)
    with torch.no_grad():
        next(other.unet.parameters()).add_(1)
    with pytest.raises(
        ReportError, match=r"made from another model.*\(fingerprint \w{12}…, the baseline has \w{12}…\); use"
    ):
        run({"mine": deployed}, {}, reference, tmp_path / "r", samples=6, baseline=other)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_is_told(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: DeployedPipeline, steps: int) -> None:
        raise ArtifactMismatchError("only the recorded number is known")

    monkeypatch.setattr(DeployedPipeline, "at_steps", refuse)
    plans = {"all": Plan(IEC(), "all")}
    report = run({"mine": deployed}, plans, reference, tmp_path / "r", samples=6, resamples=2)
    told = "\n".join(report.protocol.notes)
    assert "No KID, precision and recall: random images holds statistics without" in told
    assert "No inception score: block-means returns no class scores." in told
    assert "mine: no compute-matched row for no correction, " in told
    assert "steps: only the recorded number is known" in told


def test_the_number_of_real_images_is_the_one_that_is_compared(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    kept = replace(reference, real=torch.rand(7, 4))
    options = {"samples": 6, "resamples": 2, "compute_matched": False}
    report = run(deployed, {}, kept, tmp_path / "r", **options)  # type: ignore[arg-type]
    assert report.protocol.reference_count == 50
    lines = dict(metric_lines(report))
    assert lines["KID"].endswith("6 images against 7 real ones; unscaled")


def test_plans_of_the_same_steps_count_once(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    plans = {
        "full": Plan(IEC(), "full"),
        "all": Plan(IEC(), "all"),
        "twice": Plan(IEC(iterations=2), "all"),
    }
    options = {"samples": 6, "resamples": 2, "compute_matched": False}
    report = run({"mine": deployed}, plans, reference, tmp_path / "r", **options)  # type: ignore[arg-type]
    assert [row.same_steps_as for row in report.rows] == [None, None, "full", None]
    assert report.rows[2].verdict.sentence.startswith("Same steps as full. ")
    assert report.rows[2].frechet == report.rows[1].frechet
    measured = [each for each in (tmp_path / "r" / "measurements").iterdir() if each.is_dir()]
    assert len(measured) == 3  # "full" and "all" are the same run of this artifact


def test_a_plan_that_leaves_no_cached_call(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    report = run({"mine": deployed}, {"full": Plan(Refresh())}, reference, tmp_path / "r", samples=6)
    row = next(row for row in report.rows if row.plan == "full")
    assert row.evaluations == {"full": 4, "cached": 0}
    assert row.overhead is not None
    assert row.overhead.defined > 0


def test_a_plan_called_like_a_row_that_the_report_adds_is_kept(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    plans = {"forecast+hindsight": Plan(Forecast(order=2)) + Plan(Hindsight())}
    report = run({"mine": deployed}, plans, reference, tmp_path / "r", samples=6)
    roles = {row.plan: row.role for row in report.rows}
    assert roles["forecast+hindsight"] == "plan"
    assert roles["forecast+hindsight, compute-matched"] == "equal compute"
