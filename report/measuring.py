"""`run`: every plan on every artifact, from equal seeds, judged against one reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from errata.calibration import model_fingerprint
from errata.correct import Plan
from errata.correct.corrector import Method
from errata.correct.costs import Costs, measure_costs
from errata.correct.sampling import FloatSampler, Inputs, PlanSampler, Sampler, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.directories import staged_directory
from errata.errors import ReportError
from errata.quality.reference import Reference
from errata.report.assembly import FLOAT_KEY, Key, assemble_rows, steps_of
from errata.report.page import Strips, html, require_jinja2
from errata.report.plots import require_matplotlib
from errata.report.provenance import (
    exception_notes,
    kernels_of,
    make_protocol,
    rank_notes,
    scatter_notes,
    size_of,
)
from errata.report.results import FLOAT, Report
from errata.report.strips import strip
from errata.report.tally import Tally
from errata.report.text import markdown


def run(
    deployed: DeployedPipeline | Mapping[str, DeployedPipeline],
    plans: Mapping[str, Plan],
    reference: Reference,
    out: str | Path,
    *,
    samples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    baseline: DiffusionPipeline | None = None,
    inputs: Inputs = default_inputs,
    resamples: int = 200,
    shown: int = 16,
    recorded: Report | None = None,
    command: str = "errata.report.run(…)",
) -> Report:
    """Measures quality, denoiser calls and time of each plan on each artifact; writes the report to `out`.

    `out` gets `report.json` (schema: `errata.report.results`), `report.md` and `report.html`. Image i starts
    from `seed + i` in every row. An uncorrected run of each artifact is always measured.

    Args:
        deployed: an artifact, named by its recipe, or several by name; all with the same number of steps.
        plans: by name.
        reference: what images are compared with, and in which features.
        out: a directory that does not exist yet, or is empty.
        samples: images per row; at least 2.
        batch_size: images per batch; each batch is run under all plans in turn, so that their times compare.
        baseline: the float pipeline that the artifacts came from, with the recorded scheduler; adds its row,
            PSNR, and its images. It must be the very model that the artifacts were made from.
        seed: of image 0.
        inputs: the pipelines' keyword arguments for a batch of sample indices.
        resamples: bootstrap resamples per interval.
        shown: how many seeds the page shows.
        recorded: an earlier report to show in a section of its own.
        command: what to run to get this report again, for the page.

    Raises:
        ReportError: an argument does not fit, `out` is taken, or the extra `report` is not installed.
        PlanError: an artifact cannot serve a plan.
    """
    require_jinja2()
    require_matplotlib()
    artifacts = _named(deployed)
    _check(artifacts, samples=samples, batch_size=batch_size, resamples=resamples, shown=shown)
    if baseline is not None:
        _check_origin(artifacts, baseline)
    plans = with_uncorrected(plans)
    with staged_directory(Path(out), error=ReportError) as staging:
        samplers = _samplers(artifacts, plans, baseline, seed=seed, inputs=inputs)
        batches = batches_of(samples, batch_size)
        costs, image_size = _warm_up(artifacts, samplers, reference, batches[0])
        notes = rank_notes(samples, reference) + exception_notes(artifacts)
        tallies = _sample(samplers, reference, batches, shown=shown)
        rows = assemble_rows(
            tallies,
            plans,
            costs,
            reference,
            resamples=resamples,
            seed=seed,
            same_steps=same_steps(artifacts, plans),
        )
        report = Report(
            rows=rows,
            protocol=make_protocol(
                next(iter(artifacts.values())),
                reference,
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                image_size=image_size,
                resamples=resamples,
                command=command,
                notes=notes + scatter_notes(rows),
            ),
            sizes={name: size_of(artifact) for name, artifact in artifacts.items()},
            backends={name: kernels_of(artifact) for name, artifact in artifacts.items()},
        )
        strips = {key: strip(tally.shown) for key, tally in tallies.items() if shown}
        _write(report, strips, staging, recorded=recorded)
    return report


def with_uncorrected(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans, the one that corrects nothing first; it is added if it is not there.

    Raises:
        ReportError: several plans that correct nothing, or one that corrects is called "none".
    """
    plain = {name: plan for name, plan in plans.items() if plan.corrects_nothing}
    if len(plain) > 1:
        raise ReportError(f"plans {sorted(plain)} all correct nothing; keep one")
    if not plain and "none" in plans:
        raise ReportError(f'plan "none" corrects steps {steps_of(plans["none"])!r}; give it another name')
    return {**(plain or {"none": Plan.none()}), **plans}


def same_steps(artifacts: Mapping[str, DeployedPipeline], plans: Mapping[str, Plan]) -> dict[Key, str]:
    """For each row that repeats an earlier plan of its artifact, method and steps, the name of that plan.

    Raises:
        PlanError: an artifact cannot serve a plan.
    """
    repeated: dict[Key, str] = {}
    for artifact, deployed in artifacts.items():
        seen: list[tuple[str, tuple[tuple[Method, tuple[int, ...]], ...]]] = []
        for name, plan in plans.items():
            placed = plan.placed(deployed.schedule)
            earlier = next((first for first, same in seen if same == placed), None)
            if earlier is None:
                seen.append((name, placed))
            else:
                repeated[artifact, name] = earlier
    return repeated


def _named(deployed: DeployedPipeline | Mapping[str, DeployedPipeline]) -> dict[str, DeployedPipeline]:
    if isinstance(deployed, DeployedPipeline):
        return {deployed.manifest.recipe.name: deployed}
    if not isinstance(deployed, Mapping):
        raise TypeError(
            f"report.run takes what deploy.load(path) returns, or a mapping of names to that; got a "
            f"{type(deployed).__name__}"
        )
    return dict(deployed)


def _check(
    artifacts: Mapping[str, DeployedPipeline], *, samples: int, batch_size: int, resamples: int, shown: int
) -> None:
    for name, value, least in (
        ("samples", samples, 2),
        ("batch_size", batch_size, 1),
        ("resamples", resamples, 2),
        ("shown", shown, 0),
    ):
        if value < least:
            raise ReportError(f"{name}={value}; it must be at least {least}")
    if not artifacts:
        raise ReportError("there is no artifact to report on; pass at least one")
    if FLOAT in artifacts:
        raise ReportError(f"an artifact is called {FLOAT!r}, which names the float model's row; rename it")
    steps = {name: artifact.num_inference_steps for name, artifact in artifacts.items()}
    if len(set(steps.values())) > 1:
        raise ReportError(
            f"the artifacts have different numbers of steps, {steps}; report on them one by one"
        )


def _check_origin(artifacts: Mapping[str, DeployedPipeline], baseline: DiffusionPipeline) -> None:
    found = model_fingerprint(baseline.unet)
    for name, artifact in artifacts.items():
        expected = artifact.manifest.calibration["fingerprint"]
        if found != expected:
            raise ReportError(
                f"artifact {name!r} was made from another model than the baseline (fingerprint "
                f"{expected[:12]}…, the baseline has {found[:12]}…); pass the pipeline that was compressed, "
                "or leave the baseline out"
            )


def _samplers(
    artifacts: Mapping[str, DeployedPipeline],
    plans: Mapping[str, Plan],
    baseline: DiffusionPipeline | None,
    *,
    seed: int,
    inputs: Inputs,
) -> dict[Key, Sampler]:
    samplers: dict[Key, Sampler] = {}
    if baseline is not None:
        first = next(iter(artifacts.values()))
        samplers[FLOAT_KEY] = FloatSampler(
            baseline,
            num_inference_steps=first.num_inference_steps,
            calls=first.schedule.num_steps,
            seed=seed,
            inputs=inputs,
        )
    for artifact, deployed in artifacts.items():
        for name, plan in plans.items():
            samplers[artifact, name] = PlanSampler(deployed, plan, seed=seed, inputs=inputs)
    return samplers


def _warm_up(
    artifacts: Mapping[str, DeployedPipeline],
    samplers: Mapping[Key, Sampler],
    reference: Reference,
    batch: range,
) -> tuple[dict[str, Costs], tuple[int, int, int]]:
    """Costs of every artifact, and height, width and channels; what fails, fails here and not after hours."""
    image_size: tuple[int, int, int] | None = None
    for artifact, keys in groupby(samplers, key=lambda key: key[0]):
        images = samplers[next(keys)].sample(range(1)).images
        reference.features(images)
        _, channels, height, width = images.shape
        if image_size not in (None, (height, width, channels)):
            raise ReportError(f"artifact {artifact!r} makes {width}x{height} images, others another size")
        image_size = (height, width, channels)
    assert image_size is not None  # there is at least one artifact
    costs = {name: measure_costs(deployed, batch_size=len(batch)) for name, deployed in artifacts.items()}
    return costs, image_size


def _sample(
    samplers: Mapping[Key, Sampler], reference: Reference, batches: Sequence[range], *, shown: int
) -> dict[Key, Tally]:
    """Every batch under every row in turn; an artifact's plans rotate, so that none is always first."""
    tallies = {key: Tally(shown=shown) for key in samplers}
    total = len(samplers) * sum(map(len, batches))
    with tqdm(total=total, unit="image", desc="sampling") as bar:
        for number, batch in enumerate(batches):
            float_images: Tensor | None = None
            for key in _order(tuple(samplers), number):
                sampled = samplers[key].sample(batch)
                if key == FLOAT_KEY:
                    float_images = sampled.images
                tallies[key].add(sampled, reference, float_images=float_images if key != FLOAT_KEY else None)
                bar.update(len(batch))
    return tallies


def _order(keys: Sequence[Key], number: int) -> list[Key]:
    ordered: list[Key] = []
    for _, group in groupby(keys, key=lambda key: key[0]):
        rows = list(group)
        turn = number % len(rows)
        ordered += rows[turn:] + rows[:turn]
    return ordered


def _write(report: Report, strips: Strips, folder: Path, *, recorded: Report | None) -> None:
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report, strips, recorded=recorded), encoding="utf-8")
