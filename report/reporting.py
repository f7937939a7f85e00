"""`run`: every plan on every artifact, from equal seeds, judged against one reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline

from errata.correct import Plan
from errata.correct.sampling import Inputs, default_inputs
from errata.deploy import DeployedPipeline
from errata.quality.reference import Reference
from errata.report.measuring import measure
from errata.report.merging import check_output, merge, read_report
from errata.report.results import Report
from errata.report.scoring import Scorer

_log = logging.getLogger(__name__)


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
    scorer: Scorer | None = None,
    equal_compute: bool = True,
    amplification: str | None = None,
    resamples: int = 200,
    shown: int = 16,
    recorded: Report | None = None,
    command: str = "errata.report.run(…)",
    announce: Callable[[str], None] = _log.info,
) -> Report:
    """Measures quality, denoiser calls and time of each plan on each artifact; writes the report to `out`.

    `out` gets `report.json` (schema: `errata.report.results`), `report.md` and `report.html`, and
    `measurements/`, from which a run that was stopped goes on, and which may be removed afterwards. Image i
    starts from `seed + i` in every row. An uncorrected run of each artifact is always measured. Started by
    `accelerate launch` or `torchrun`, the processes share the batches, and the result is the same.

    Args:
        deployed: an artifact, named by its recipe, or several by name; all with the same number of steps.
        plans: by name.
        reference: what images are compared with, and in which features.
        out: a directory that does not exist yet, is empty, or holds measurements with the same settings.
        samples: images per row; at least 2.
        batch_size: images per batch; each batch is run under all plans in turn, so that their times compare.
        baseline: the float pipeline that the artifacts came from, with the recorded scheduler; adds its row,
            distances of single images, and how errors grow along a run. It must be the very model that the
            artifacts were made from. Without it, images are compared with the same artifact's uncorrected.
        seed: of image 0.
        inputs: the pipelines' keyword arguments for a batch of sample indices.
        scorer: what is measured of single images beside PSNR and SSIM: LPIPS, a CLIP score.
        equal_compute: whether to add, for every plan that costs something, rows of what else the same compute
            buys, see `errata.report.equal_compute`.
        amplification: denoiser calls, such as "0,12,24", at which to measure how much a step amplifies an
            error; None measures it nowhere. Each takes hundreds of evaluations.
        resamples: bootstrap resamples per interval.
        shown: how many seeds the page shows.
        recorded: an earlier report to show in a section of its own.
        command: what to run to get this report again, for the page.
        announce: hears how much there is to do, once that is known.

    Raises:
        ReportError: an argument does not fit, `out` is taken, or the extra `report` is not installed.
        PlanError: an artifact cannot serve a plan.
    """
    check_output(resamples)
    out = Path(out)
    workers = measure(
        deployed,
        plans,
        reference,
        out,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        baseline=baseline,
        inputs=inputs,
        scorer=scorer,
        equal_compute=equal_compute,
        amplification=amplification,
        shown=shown,
        announce=announce,
    )
    if workers.is_first:
        merge([out], out, resamples=resamples, recorded=recorded, command=command)
    workers.wait()
    return read_report(out)
