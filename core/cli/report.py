"""`errata report`: what each correction costs, and what quality it buys."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.conditions import (
    SOURCES_TOLD,
    add_condition_options,
    check_conditions,
    inputs_of,
    read_conditions,
)
from errata.cli.output import emit
from errata.cli.plan_files import auto_plan
from errata.cli.plans import AUTO, plan_text
from errata.cli.report_options import (
    add_grid_options,
    add_metric_options,
    add_plain_options,
    add_scale_options,
    command_of,
    has_auto,
    plain_options,
    plans_of,
)
from errata.cli.usage import (
    Commands,
    UsageError,
    add_backend_option,
    add_command,
    add_device_option,
    check_seeds,
    is_first_process,
    misuse,
    usual_device,
)
from errata.errors import ReportError

if TYPE_CHECKING:
    from errata.correct import Plan
    from errata.correct.sampling import Inputs
    from errata.deploy import DeployedPipeline
    from errata.quality import Metric
    from errata.report import Reference, Report, ReportRequest, Scorer, Shard

DETAILS = f"""\
Generates the same images without correction and with each plan, on every artifact, and compares them with
real images by the Fréchet distance in the features of a network. For each plan that costs something, it also
measures compute-matched alternatives: more sampling steps, more full steps, another corrector, the float
model with fewer steps. Writes report.html, report.md and report.json, which say whether each correction pays.

  errata report runs/digits/artifact --reference embedded --at ends:1/10 --at all --out runs/digits/report
  errata report runs/a runs/b --reference photos --features inception --samples 10000 --out runs/report \\
      --correct iec@all --correct refresh@middle+forecast+hindsight --baseline google/ddpm-cifar10-32

To resume an interrupted run, repeat the command. To use several processes, start it as
`torchrun --nproc-per-node 4 -m errata.cli report …`, or with `accelerate launch` on GPUs. For independent
jobs, give each one of --shard 0/16 to 15/16, then merge them:

  errata report --merge runs/report --out runs/report

To save the statistics of real images, for use as --reference later:

  errata report --save-stats photos.npz --reference photos --features inception

{SOURCES_TOLD}
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "report",
        summary="measure the cost of each correction and the quality that it buys",
        details=DETAILS,
    )
    _add_places(parser)
    add_plain_options(parser.add_argument_group("measurement"))
    add_condition_options(parser)
    add_device_option(parser)
    add_backend_option(parser)
    add_metric_options(parser.add_argument_group("metrics"))
    add_grid_options(parser.add_argument_group("correction"))
    add_scale_options(parser.add_argument_group("many processes"))
    parser.set_defaults(run=run)


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Declare what is read, and where the report goes."""
    parser.add_argument(
        "artifacts", type=Path, nargs="*", metavar="ARTIFACT", help="directory that `errata deploy` wrote"
    )
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="real images: a folder of PNG or JPEG files, DATASET:COLUMN, an .npz of statistics (mu, sigma), "
        "or `embedded`, the digits of the built-in model",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for the report")
    parser.add_argument(
        "--baseline",
        metavar="PIPELINE",
        help="the float pipeline, for its own row and image-by-image comparisons",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.merge:
        return _merge(args)
    _require(args, "reference")
    if args.save_stats is not None:
        return _save_statistics(args)
    _require(args, "out")
    if not args.artifacts:
        raise UsageError("ARTIFACT is missing; give what `errata deploy` wrote, or --merge DIR")
    return _report(args)


def _report(args: argparse.Namespace) -> int:
    from errata.report import Shard
    from errata.report.runner import run_request

    check_seeds(args.seed, args.samples)
    plans = plans_of(args)
    with misuse(ReportError):
        shard = None if args.shard is None else Shard.parse(args.shard)
    request = _request(args, plans)
    if shard is not None:
        return _measure(args, request, shard)
    command = shlex.join(command_of(args))
    return _print_report(args, run_request(request, args.out, command=command, announce=_announce))


def _request(args: argparse.Namespace, plans: "dict[str, Plan]") -> "ReportRequest":
    from errata.report import ReportRequest

    conditions = read_conditions(args, args.samples)
    reference = _reference(args)
    artifacts = _artifacts(args)
    for deployed in artifacts.values():
        check_conditions(deployed.pipe, args, conditions)
    first = next(iter(artifacts.values())).pipe
    reference.network.to(first.device)  # also that of the embedded reference
    inputs = inputs_of(first, args, conditions)
    return ReportRequest(
        artifacts=artifacts,
        plans={**plans, **(_auto_plans(args, artifacts, inputs) if has_auto(args) else {})},
        reference=reference,
        baseline=_baseline(args, first.device),
        inputs=inputs,
        scorer=_scorer(args, first.device),
        metrics=_own_metrics(args),
        **plain_options(args),
    )


def _auto_plans(
    args: argparse.Namespace, artifacts: "dict[str, DeployedPipeline]", inputs: "Inputs"
) -> "dict[str, dict[str, Plan]]":
    """Return the plan that is chosen for each artifact, as one row; none where no correction is best."""
    chosen = {}
    for path, (name, deployed) in zip(args.artifacts, artifacts.items(), strict=True):
        plan = auto_plan(path, deployed, inputs)
        _announce(f"auto chose for {name}: {plan_text(plan)}")
        if not plan.corrects_nothing:
            chosen[name] = plan
    return {AUTO: chosen} if chosen else {}


def _measure(args: argparse.Namespace, request: "ReportRequest", shard: "Shard") -> int:
    from errata.report.runner import measure_request

    measure_request(request, args.out, shard=shard, announce=_announce)
    if is_first_process():
        text = f"shard {shard} is measured in {args.out}; make the report with errata report --merge DIR"
        emit(args, {"shard": str(shard), "out": str(args.out)}, text)
    return 0


def _announce(text: str) -> None:
    print(f"errata: {text}", file=sys.stderr)


def _merge(args: argparse.Namespace) -> int:
    _require(args, "out")
    if args.artifacts or args.shard is not None or args.save_stats is not None:
        raise UsageError("--merge reads measurements only; leave out ARTIFACT, --shard and --save-stats")

    from errata import report

    command = shlex.join(["errata", "report", "--merge", *map(str, args.merge), "--out", str(args.out)])
    metrics = _own_metrics(args)
    result = report.merge(args.merge, args.out, resamples=args.resamples, metrics=metrics, command=command)
    return _print_report(args, result)


def _save_statistics(args: argparse.Namespace) -> int:
    if args.artifacts or args.out is not None or args.shard is not None:
        raise UsageError("--save-stats writes statistics and stops; leave out ARTIFACT, --out and --shard")
    if args.save_stats.suffix != ".npz":
        raise UsageError(f"`{args.save_stats}` is not an .npz file; choose a name that ends in .npz")
    if args.save_stats.exists():
        raise ReportError(f"`{args.save_stats}` exists; choose another file or remove it")
    if not args.save_stats.parent.is_dir():
        raise ReportError(f"cannot make `{args.save_stats}`: its parent is not a directory; create it first")
    reference = _reference(args)
    reference.save(args.save_stats, with_features=reference.real is not None)
    count, dimension = reference.statistics.count, reference.statistics.dimension
    emit(
        args,
        {"statistics": str(args.save_stats), "images": count, "features": dimension},
        f"wrote statistics of {count} images, {dimension} features of {reference.name}, to {args.save_stats}",
    )
    return 0


def _print_report(args: argparse.Namespace, result: "Report") -> int:
    from errata import report

    page = args.out / "report.html"
    if is_first_process():
        tables = f"{report.text_table(result)}\n\n{report.free_run_text(result)}"
        emit(args, {"report": str(page), **result.to_json()}, f"{tables}\n\nreport: {page}")
    return 0


def _require(args: argparse.Namespace, option: str) -> None:
    if getattr(args, option) is None:
        raise UsageError(f"--{option} is missing; see `errata report --help`")


def _reference(args: argparse.Namespace) -> "Reference":
    from errata import quality, report

    if args.reference == "embedded" and args.features != "digit-features":
        raise UsageError(
            f"--reference embedded has digit-features only, not {args.features}; give a folder, "
            "DATASET:COLUMN or an .npz file as --reference, or leave out --features"
        )
    network = quality.open_network(args.features).to(args.device or usual_device())
    return report.Reference.open(args.reference, network)


def _artifacts(args: argparse.Namespace) -> "dict[str, DeployedPipeline]":
    """Return artifacts by recipe; if two share one, by the last part of each path, or by the whole path."""
    from errata import deploy

    if len(set(args.artifacts)) < len(args.artifacts):
        raise UsageError("an ARTIFACT is given twice; give each once")
    loaded = [
        deploy.load(path, device=args.device or usual_device(), backend=args.backend)
        for path in args.artifacts
    ]
    names = [deployed.manifest.recipe.name for deployed in loaded]
    for other in ([path.resolve().name for path in args.artifacts], list(map(str, args.artifacts))):
        if len(set(names)) < len(names):
            names = other
    return dict(zip(names, loaded, strict=True))


def _baseline(args: argparse.Namespace, device: Any) -> Any:
    if args.baseline is None:
        return None

    from errata import calibration

    return calibration.load_pipeline(args.baseline).to(device)


def _scorer(args: argparse.Namespace, device: Any) -> "Scorer":
    from errata import quality
    from errata.report import Scorer

    lpips, clip = None, None
    if args.lpips is not None:
        lpips = quality.Lpips(backbone=args.lpips, device=device)
    if args.clip is not None:
        if args.prompts is None:
            raise UsageError("--clip compares images with their prompts; give --prompts, or leave out --clip")
        clip = quality.ClipScore(args.clip, device=device)
    return Scorer(lpips=lpips, clip=clip)


def _own_metrics(args: argparse.Namespace) -> "list[Metric]":
    from errata.quality.metric import load_metric

    with misuse(ReportError):
        return [load_metric(spec) for spec in args.metric or ()]
