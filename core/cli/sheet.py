"""`errata sheet`: a free repair of an artifact, in a file of its own."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from errata.cli.conditions import (
    SOURCES_TOLD,
    add_condition_options,
    check_conditions,
    inputs_of,
    read_conditions,
)
from errata.cli.output import emit
from errata.cli.plan_files import auto_plan, is_auto
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
from errata.errors import CalibrationError, PlanError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from errata.deploy import DeployedPipeline

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
    check_new_file(args.out)
    count = args.samples + args.held_out
    check_seeds(args.seed, count)
    told = f"--samples {args.samples} with --held-out {args.held_out}"
    conditions = read_conditions(args, count, told=told)
    plan = None if is_auto(args) else plan_from(args)

    from errata import correct, deploy

    deployed = deploy.load(args.artifact, args.device, args.backend)
    check_conditions(deployed.pipe, args, conditions)
    inputs = inputs_of(deployed.pipe, args, conditions)
    teacher = _teacher(args, deployed)
    if plan is None:
        plan = auto_plan(args.artifact, deployed, inputs)
    journal = args.out.with_name(f"{args.out.name}.partial")
    with _resumable(args, journal):
        sheet = correct.fit_sheet(
            deployed,
            teacher,
            plan=plan,
            inputs=inputs,
            samples=args.samples,
            held_out=args.held_out,
            batch_size=args.batch_size,
            seed=args.seed,
            journal=journal,
        )
    sheet.save(args.out)
    emit(args, {"out": str(args.out), **sheet.summary()}, f"{sheet.summary_text()}\nsheet: {args.out}")
    return 0


@contextmanager
def _resumable(args: argparse.Namespace, journal: Path) -> Iterator[None]:
    """Say after Ctrl-C what was kept, and how to resume."""
    from errata.correct.sheets.fitting import RULES, SheetChoices
    from errata.journal_rules import finished_items

    try:
        yield
    except KeyboardInterrupt as stop:
        choices = SheetChoices(
            samples=args.samples, held_out=args.held_out, batch_size=args.batch_size, seed=args.seed
        )
        finished = finished_items(journal, RULES)
        sizes = {
            f"{part}-{number:05d}": len(batch)
            for part, batches in choices.batches.items()
            for number, batch in enumerate(batches)
        }
        if not (kept := sum(sizes.get(name, 0) for name in finished)):
            raise
        raise KeyboardInterrupt(
            f"interrupted; {kept} of {sum(sizes.values())} images are kept in `{journal}`; to resume, give "
            "the same command again"
        ) from stop


def _teacher(args: argparse.Namespace, deployed: "DeployedPipeline") -> "DiffusionPipeline | Literal['self']":
    """Return the teacher that `--teacher` names.

    Raises:
        PlanError: it is `self`, and the artifact has no cache; or it is an artifact, or no pipeline.
    """
    if args.teacher == "self":
        if not deployed.schedule.has_cache:
            raise PlanError(
                f"--teacher self repairs what a cache does, and `{args.artifact}` has no cache; give the "
                "float pipeline that the artifact was made from, as a hub name or folder"
            )
        return "self"

    from errata import calibration
    from errata.deploy.manifest import MANIFEST_FILE

    if (Path(args.teacher) / MANIFEST_FILE).is_file():
        raise PlanError(
            f"--teacher {args.teacher} is an artifact; give the float pipeline that the artifact was made "
            "from, or `self` for an artifact with a cache"
        )
    try:
        return calibration.load_pipeline(args.teacher).to(deployed.pipe.device)
    except CalibrationError as problem:
        raise PlanError(f"--teacher {args.teacher}: {problem}") from problem
