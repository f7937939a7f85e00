"""`errata plan`: the best correction within a budget."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.conditions import (
    SOURCES_TOLD,
    add_condition_options,
    check_conditions,
    inputs_of,
    read_conditions,
)
from errata.cli.output import emit
from errata.cli.plans import plan_text
from errata.cli.usage import (
    DIGIT_FEATURES,
    Commands,
    UsageError,
    add_artifact_argument,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_features_option,
    add_seed_option,
    check_new_file,
    check_seeds,
    open_reference,
    overhead,
    several,
)
from errata.errors import ErrataWarning

if TYPE_CHECKING:
    from errata.correct import Plan
    from errata.quality import Reference

# Images that a forecast is fitted to, at most: `errata.correct.fitting.FitChoices`, which is slow to import.
FITTED_TO = 32
DETAILS = f"""\
Measures what each kind of denoiser call costs, and tries every correction that fits the budget, all from the
same noise: it drops the worse half, doubles the images, and repeats. Then it measures the best one again on
images that the search did not use. If that is no better than no correction, the plan corrects nothing.
`errata generate` and `errata report` take the plan with --plan, for this artifact only.

With --reference, images are compared with real ones by a Fréchet distance in the features of --features. Give
several times as many --samples as the network has features: 64 for digit-features, 2048 for inception.
Without --reference, images are compared with those of the same artifact without its cache.

  errata plan runs/digits/artifact --max-overhead 15% --reference embedded --out runs/digits/plan.json
  errata plan runs/cifar/artifact --max-overhead 15% --reference photos --features inception \\
      --samples 10000 --out runs/cifar/plan.json

Models that take prompts, labels or input images need one for every image: two for each of --samples, and 32
more.

{SOURCES_TOLD}
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "plan", summary="find the best correction within a budget", details=DETAILS
    )
    add_artifact_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file for the plan")
    parser.add_argument(
        "--max-overhead",
        type=overhead,
        default=0.15,
        metavar="X",
        help="budget for extra denoiser time, as a fraction of a run without correction: 0.15 or 15%% "
        "(default: 0.15)",
    )
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="real images: a folder of PNG or JPEG files, DATASET:COLUMN, an .npz of statistics (mu, sigma), "
        "or `embedded`, the digits of the built-in model (default: the artifact without its cache)",
    )
    add_features_option(parser, default=None)
    parser.add_argument(
        "--samples",
        type=several,
        default=512,
        metavar="N",
        help="images of the last candidates, and as many again to measure the best (default: 512)",
    )
    add_batch_size_option(parser, default=64)
    add_seed_option(parser)
    parser.add_argument(
        "--sheet",
        action="append",
        type=Path,
        metavar="FILE",
        help="a sheet of this artifact, to be tried as well; can be repeated",
    )
    add_condition_options(parser)
    add_device_option(parser)
    add_backend_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, 3 * args.samples)
    check_new_file(args.out)
    # Those of the search, of the final measurement, and of what is fitted.
    count = 2 * args.samples + min(args.samples, FITTED_TO)
    conditions = read_conditions(args, count, told=f"--samples {args.samples}")
    reference = _reference(args)

    from errata import deploy
    from errata.correct import Sheet
    from errata.correct.planner.planning import plan

    sheets = [Sheet.load(path) for path in args.sheet or ()]
    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend)
    check_conditions(deployed.pipe, args, conditions)
    with warnings.catch_warnings():
        # The search tries sheets under other plans as well, and measures each.
        warnings.simplefilter("ignore", ErrataWarning)
        found = plan(
            deployed,
            args.max_overhead,
            reference,
            samples=args.samples,
            batch_size=args.batch_size,
            seed=args.seed,
            inputs=inputs_of(deployed.pipe, args, conditions),
            sheets=sheets,
        )
    found.save(args.out)
    emit(args, {"out": str(args.out), "plan": found.to_json()}, _text(found, args.out))
    return 0


def _reference(args: argparse.Namespace) -> "Reference | None":
    if args.reference is not None:
        return open_reference(args.reference, args.features or DIGIT_FEATURES, args.device)
    if args.features is not None:
        raise UsageError("--features has no effect without --reference; give real images, or leave it out")
    return None


def _text(plan: "Plan", out: Path) -> str:
    assert plan.expected is not None  # the planner measured it
    return "\n".join([plan_text(plan), plan.expected.summary(), f"plan: {out}"])
