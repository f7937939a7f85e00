"""How the options of `errata compress` make a recipe."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.usage import UsageError, misuse, positive, read_text, seed
from errata.errors import RecipeError

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


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, and what changes it."""
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="name or file, see below")
    layers = parser.add_argument_group(
        "layers", "PATTERN is the name of a layer or of a module that holds it; *, ? and [...] are wildcards."
    )
    layers.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these in floating point; may be repeated",
    )
    layers.add_argument(
        "--bits",
        action="append",
        default=[],
        type=_bits,
        metavar="PATTERN=BITS",
        help="give these weights other bits (4, 6 or 8), as in --bits 'up_blocks.*.conv_shortcut=8'; may be "
        "repeated, the first that fits a layer decides, those of a recipe file come last",
    )
    rounding = parser.add_argument_group("learned rounding", "For recipes such as w4a8-learned.")
    rounding.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="optimiser steps a block (default: the recipe's)",
    )
    rounding.add_argument(
        "--learning-rate",
        type=_rate,
        metavar="X",
        help="of the rounding variables (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-samples",
        type=positive,
        metavar="N",
        help="recorded inputs, of mixed steps, that a block is reconstructed on (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-batch-size",
        type=positive,
        metavar="N",
        help="of them in an optimiser step (default: the recipe's)",
    )
    rounding.add_argument(
        "--rounding-seed", type=seed, metavar="N", help="of every random choice (default: the recipe's)"
    )


def recipe_from(args: argparse.Namespace) -> "Recipe":
    """The recipe of the options.

    Raises:
        UsageError: it is unknown or malformed, or an option has no use with it.
    """
    with misuse(RecipeError):
        recipe = _read(args.recipe)
        chosen = {
            field: getattr(args, option)
            for option, field in ROUNDING_OPTIONS.items()
            if getattr(args, option) is not None
        }
        if not (chosen or args.keep or args.bits):
            return recipe
        return replace(recipe, quantization=_changed(recipe, chosen, args))


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
    if path.suffix not in {".json", ".yaml", ".yml"}:
        return Recipe.named(name)
    if not path.is_file():
        raise UsageError(f"--recipe `{name}`: there is no such file; give one, or a name such as w4a8")
    try:
        return Recipe.from_text(read_text(path))
    except RecipeError as problem:
        raise UsageError(f"--recipe `{name}`: {problem}") from problem


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
