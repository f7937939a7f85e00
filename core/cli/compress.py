"""`errata compress`: simulate low bits and a cache."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command, misuse, read_text
from errata.errors import RecipeError

if TYPE_CHECKING:
    from errata.compress import Recipe

DETAILS = """\
Recipes: w8a8 and w4a8 are bits of weights and activations; deepcache-N reuses deep features for N steps;
`+` joins the two, and options follow a colon: w8a8+deepcache-10:branch=1. A recipe may also be a .json
or .yaml file. Refuses a directory that is not empty.

  errata compress google/ddpm-cifar10-32 --calibration runs/cifar/calibration \\
      --recipe w4a8+deepcache-5 --out runs/cifar/compressed
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compress",
        summary="quantize a calibrated pipeline and give it a cache",
        details=DETAILS,
    )
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="the one that was calibrated: hub name or local folder"
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, metavar="DIR", help="what `errata calibrate` wrote"
    )
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="name or file, see below")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import calibration, compress

    recipe = _read_recipe(args.recipe)
    recording = calibration.load(args.calibration)
    pipe = calibration.load_pipeline(args.pipeline)
    compress.apply(pipe, recording, recipe, args.out)
    emit(args, {"compressed": str(args.out), "recipe": recipe.name}, f"{recipe.name} model is in {args.out}")
    return 0


def _read_recipe(name: str) -> "Recipe":
    from errata.compress import Recipe

    path = Path(name)
    if path.suffix in {".json", ".yaml", ".yml"} and path.is_file():
        return Recipe.from_text(read_text(path))
    with misuse(RecipeError):
        return Recipe.named(name)
