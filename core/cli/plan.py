"""`errata plan`: the correction that buys most within a budget."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.inputs import check_unconditional
from errata.cli.output import emit
from errata.cli.usage import (
    Commands,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    budget,
    check_seeds,
    several,
)
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Plan

DETAILS = """\
Measures what denoiser calls cost, tries every correction that fits the budget from equal noise, drops the
worse half, doubles the images, and so on. The best is measured anew on images that the search did not use;
if it is no better than no correction there, the plan corrects nothing. `errata generate` and `errata report`
take the file with --plan, for this artifact only.

Without --reference, images are compared with those of the artifact itself without its cache.

  errata plan runs/digits/artifact --max-overhead 0.15 --reference embedded --out runs/digits/plan.json
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "plan", summary="find the correction that buys most within a budget", details=DETAILS
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file for the plan")
    parser.add_argument(
        "--max-overhead",
        type=budget,
        default=0.15,
        metavar="X",
        help="extra time of denoiser calls, as a fraction of a run without correction (default: 0.15)",
    )
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="real images: a folder of PNG or JPEG files, an .npz of statistics (mu, sigma), or `embedded`, "
        "the digits of the built-in model (default: the artifact without its cache)",
    )
    parser.add_argument(
        "--samples",
        type=several,
        default=512,
        metavar="N",
        help="images of the last candidates, and as many again to measure the best (default: 512)",
    )
    add_batch_size_option(parser, default=64)
    add_seed_option(parser)
    add_device_option(parser)
    add_backend_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, 3 * args.samples)  # of the search, the expectation, and what is fitted
    _check_place(args.out)

    from errata import deploy, quality
    from errata.correct.planner.planning import plan

    reference = None if args.reference is None else quality.Reference.open(args.reference)
    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend)
    check_unconditional(deployed.pipe, what="a plan")
    found = plan(
        deployed,
        args.max_overhead,
        reference,
        samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    found.save(args.out)
    emit(args, {"out": str(args.out), "plan": found.to_json()}, _text(found, args.out))
    return 0


def _check_place(out: Path) -> None:
    """Refuse it before the search that would fill it.

    Raises:
        PlanError: something is there, or its folder is not.
    """
    if out.exists() or out.is_symlink():
        raise PlanError(f"`{out}` exists; choose another file or remove it")
    if not out.parent.is_dir():
        raise PlanError(f"cannot make `{out}`: `{out.parent}` is no directory; create it first")


def _text(plan: "Plan", out: Path) -> str:
    assert plan.expected is not None  # the planner measured it
    parts = [f"{method} at {steps}" for method, steps in plan.parts if method is not None]
    return "\n".join([" + ".join(parts) or "no correction", plan.expected.summary(), f"plan: {out}"])
