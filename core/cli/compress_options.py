"""The options of `errata compress`, and the recipe that they describe."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.conditions import add_input_options
from errata.cli.usage import UsageError, misuse, positive, read_text, seed
from errata.errors import RecipeError
from errata.presets import PRESETS

if TYPE_CHECKING:
    from errata.compress import Quantization, Recipe

# Option of the command: field of `errata.compress.LearnedRounding`.
ROUNDING_OPTIONS = {
    "iterations": "iterations",
    "learning_rate": "learning_rate",
    "rounding_samples": "samples",
    "rounding_batch_size": "batch_size",
    "rounding_seed": "seed",
}

INPUTS = ("labels", "negative_prompt", "input_images", "masks")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe and the options that change it."""
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="recipe name or file, see below")
    layers = parser.add_argument_group(
        "layers",
        "PATTERN names a layer or a module that contains it; *, ? and [...] are wildcards.",
    )
    layers.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep these layers in floating point; may be repeated",
    )
    layers.add_argument(
        "--bits",
        action="append",
        default=[],
        type=_bits,
        metavar="PATTERN=BITS",
        help="weight bits, 4, 6 or 8, of these layers, as in --bits 'up_blocks.*.conv_shortcut=8'; may be "
        "repeated: the first pattern that matches a layer counts, those of a recipe file come last",
    )
    rounding = parser.add_argument_group("learned rounding", "For recipes such as w4a8-learned.")
    rounding.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="optimizer steps per block (default: the recipe's)",
    )
    rounding.add_argument(
        "--learning-rate",
        type=_rate,
        metavar="X",
        help="learning rate of the rounding variables (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-samples",
        type=positive,
        metavar="N",
        help="recorded inputs, from all steps, on which each block is trained (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-batch-size",
        type=positive,
        metavar="N",
        help="inputs per optimizer step (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-seed", type=seed, metavar="N", help="seed of the training (default: the recipe's)"
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Declare what `errata calibrate` was given and a calibration set does not hold."""
    add_input_options(
        parser.add_argument_group(
            "input images",
            "For pipelines that take images: give what `errata calibrate` was given. A calibration set\n"
            "holds prompts and labels but no images, and without them nothing can judge the result.",
        )
    )


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Declare the options that do something else than compress."""
    modes = parser.add_argument_group("instead of compressing")
    modes.add_argument(
        "--dry-run",
        action="store_true",
        help="show how each layer would be quantized and the resulting size; write nothing",
    )
    modes.add_argument(
        "--sensitivity",
        action="store_true",
        help="quantize each layer alone, and show how much the prediction changes",
    )
    modes.add_argument(
        "--sensitivity-samples", type=positive, metavar="N", help="recorded samples per step (default: 16)"
    )
    modes.add_argument(
        "--sensitivity-steps",
        type=positive,
        metavar="N",
        help="steps to measure, evenly spaced (default: all)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Check that the options have an effect together.

    Raises:
        UsageError: naming an option that has none.
    """
    if args.dry_run and args.sensitivity:
        raise UsageError("--dry-run and --sensitivity exclude each other; give one of them")
    if args.out is None and not (args.dry_run or args.sensitivity):
        raise UsageError("--out is required: the directory to write; see `errata compress --help`")
    idle = []
    if not args.sensitivity:
        idle += ["sensitivity_samples", "sensitivity_steps"]
    if args.sensitivity or args.dry_run:
        idle += ["range_samples", "reuse", *INPUTS]
    if args.sensitivity:
        idle.append("preset")
    for name in idle:
        if getattr(args, name) is not None:
            mode = "--dry-run" if args.dry_run else "--sensitivity"
            rule = "without --sensitivity" if name.startswith("sensitivity") else f"with {mode}"
            raise UsageError(f"--{name.replace('_', '-')} has no effect {rule}; leave it out")


def recipe_from(args: argparse.Namespace) -> "Recipe":
    """Return the recipe that the options describe.

    Raises:
        UsageError: the recipe is unknown or malformed, or an option has no effect with it.
    """
    with misuse(RecipeError):
        recipe = _with_preset(_read(args.recipe), args)
        chosen = {
            field: getattr(args, option)
            for option, field in ROUNDING_OPTIONS.items()
            if getattr(args, option) is not None
        }
        if not (chosen or args.keep or args.bits):
            return recipe
        return replace(recipe, quantization=_changed(recipe, chosen, args))


def range_samples(args: argparse.Namespace) -> int:
    """Return how many trajectories ranges see: as asked for, the preset's number, or the usual one."""
    from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP

    preset = PRESETS.get(args.preset)
    return args.range_samples or (SAMPLES_PER_STEP if preset is None else preset.range_samples)


def _with_preset(recipe: "Recipe", args: argparse.Namespace) -> "Recipe":
    """Return the recipe with what the preset sets of learned rounding and the recipe's text does not.

    A recipe file states all of it.
    """
    quantization, preset = recipe.quantization, PRESETS.get(args.preset)
    if preset is None or quantization is None or quantization.rounding is None or _is_file(args.recipe):
        return recipe
    given = set(re.findall(r"[:,](\w+)=", args.recipe))
    smaller = {name: value for name, value in preset.rounding if name not in given}
    rounding = replace(quantization.rounding, **smaller)
    return replace(recipe, quantization=replace(quantization, rounding=rounding))


def _changed(recipe: "Recipe", rounding: Mapping[str, Any], args: argparse.Namespace) -> "Quantization":
    quantization = recipe.quantization
    if quantization is None:
        options = ("keep", "bits", *ROUNDING_OPTIONS)
        used = next(option for option in options if getattr(args, option) not in (None, []))
        raise UsageError(
            f"--{used.replace('_', '-')} has no effect with the recipe {recipe.name}, which quantizes nothing"
        )
    if rounding and quantization.rounding is None:
        used = next(option for option, field in ROUNDING_OPTIONS.items() if field in rounding)
        raise UsageError(
            f"--{used.replace('_', '-')} has no effect with the recipe {recipe.name}, which rounds to "
            f"nearest; choose w{quantization.weight_bits}a{quantization.activation_bits}-learned"
        )
    bits: dict[str, int] = {}
    for pattern, width in [*args.bits, *quantization.bits.items()]:
        bits.setdefault(pattern, width)
    return replace(
        quantization,
        rounding=None if quantization.rounding is None else replace(quantization.rounding, **rounding),
        bits=bits,
        modules_to_not_convert=(*args.keep, *quantization.modules_to_not_convert),
    )


def _read(name: str) -> "Recipe":
    from errata.compress import Recipe

    path = Path(name)
    if not _is_file(name):
        return Recipe.named(name)
    if not path.is_file():
        raise UsageError(f"--recipe `{name}`: no such file; give a file, or a name such as w4a8")
    try:
        return Recipe.from_text(read_text(path))
    except RecipeError as problem:
        raise UsageError(f"--recipe `{name}`: {problem}") from problem


def _is_file(name: str) -> bool:
    return Path(name).suffix in {".json", ".yaml", ".yml"}


def _bits(text: str) -> tuple[str, int]:
    from errata.runtime.weight_formats import allowed_weight_bits, weight_bits

    pattern, _, bits = text.rpartition("=")
    if not pattern or bits not in map(str, weight_bits()):
        raise argparse.ArgumentTypeError(
            f"`{text}` is not PATTERN=BITS with BITS one of {allowed_weight_bits()}, as in 'mid_block=8'"
        )
    return pattern, int(bits)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number above zero")
    return rate
