"""`errata sheet`: a free repair of an artifact, in a file of its own."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.auto_plans import auto_plan, is_auto
from errata.cli.conditions import (
    SOURCES_TOLD,
    add_condition_options,
    check_conditions,
    inputs_of,
    read_conditions,
)
from errata.cli.output import emit
from errata.cli.plans import add_plan_options, plan_from
from errata.cli.usage import (
    Commands,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_device_option,
    check_new_file,
    check_seeds,
    eight_or_more,
    seed,
)
from errata.errors import PlanError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DETAILS = f"""\
Samples with the artifact, asks the teacher for the right prediction at every step, and fits a small map of
the artifact's predictions for each step. The map costs nothing at sampling. Then it compares images with the
teacher's, on noise that the fit did not see; if the map does not help there, no file is written. To resume an
interrupted run, give the same command again.

The teacher is the float pipeline that the artifact was made from. Where that is gone, `--teacher self`
repairs what a cache does, with the artifact's own full calls. Give the same correction as you will sample
with:

  errata sheet runs/cifar/w4a8 --teacher google/ddpm-cifar10-32 --out runs/cifar/w4a8.sheet
  errata generate runs/cifar/w4a8 --sheet runs/cifar/w4a8.sheet --out runs/cifar/images
  errata sheet runs/cifar/cached --teacher self --correct forecast --out runs/cifar/cached.sheet

{SOURCES_TOLD}
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "sheet", summary="fit a free repair to an artifact", details=DETAILS)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="artifact or engine")
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="PIPELINE",
        help="the float pipeline, a hub name or local folder; or self, for artifacts with a cache",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file for the sheet")
    parser.add_argument(
        "--samples", type=eight_or_more, default=64, metavar="N", help="images of the fit (default: 64)"
    )
    parser.add_argument(
        "--held-out",
        type=eight_or_more,
        default=64,
        metavar="N",
        help="further images; half of them choose the kind of map, the others measure it (default: 64)",
    )
    add_batch_size_option(parser, default=32)
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the fit's noise, which is never that of images with small seeds (default: 0)",
    )
    add_condition_options(parser)
    add_device_option(parser)
    add_backend_option(parser)
    add_plan_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    count = args.samples + args.held_out
    check_seeds(args.seed, count)
    told = f"--samples {args.samples} with --held-out {args.held_out}"
    prompts, labels = read_conditions(args, count, told=told)
    plan = None if is_auto(args) else plan_from(args)
    check_new_file(args.out)

    from errata import correct, deploy

    deployed = deploy.load(args.artifact, args.device, args.backend)
    check_conditions(
        deployed.pipe, args, labels, way_out="fit a sheet from Python: errata.correct.fit_sheet(…)"
    )
    inputs = inputs_of(deployed.pipe, args, prompts, labels)
    sheet = correct.fit_sheet(
        deployed,
        _teacher(args, deployed.pipe.device),
        plan=auto_plan(args, deployed, inputs) if plan is None else plan,
        inputs=inputs,
        samples=args.samples,
        held_out=args.held_out,
        batch_size=args.batch_size,
        seed=args.seed,
        journal=args.out.with_name(f"{args.out.name}.partial"),
    )
    sheet.save(args.out)
    emit(args, {"out": str(args.out), **sheet.summary()}, f"{sheet.summary_text()}\nsheet: {args.out}")
    return 0


def _teacher(args: argparse.Namespace, device: object) -> "DiffusionPipeline | str":
    if args.teacher == "self":
        return "self"

    from errata import calibration
    from errata.deploy.manifest import MANIFEST_FILE

    if (Path(args.teacher) / MANIFEST_FILE).is_file():
        raise PlanError(
            f"--teacher {args.teacher} is an artifact; give the float pipeline that the artifact was made "
            "from, or `self` for an artifact with a cache"
        )
    return calibration.load_pipeline(args.teacher).to(device)
