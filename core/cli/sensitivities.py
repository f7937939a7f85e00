"""`errata compress --sensitivity`: which layers low bits hurt."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.output import emit
from errata.cli.usage import UsageError

if TYPE_CHECKING:
    from errata.calibration import CalibrationSet
    from errata.compress import Recipe
    from errata.compress.quantize.sensitivity_table import SensitivityTable

SAMPLES = 16


def measure(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    """Measure, write the file of `--out` if there is one, and print."""
    _check(args.out, recipe)
    from errata import calibration
    from errata.compress.quantize import sensitivity

    table = sensitivity.measure(
        calibration.load_pipeline(args.pipeline),
        recording,
        recipe,
        samples=args.sensitivity_samples or SAMPLES,
        steps=args.sensitivity_steps,
    )
    text = table.text().rstrip("\n")
    if args.out is not None:
        args.out.write_text(_file(table, args.out), encoding="utf-8")
        text += f"\nthe table is in {args.out}"
    emit(args, table.to_json(), text)
    return 0


def _check(out: Path | None, recipe: "Recipe") -> None:
    """Refuse, before the work, what could not be measured or written.

    Raises:
        UsageError: naming the option.
    """
    if recipe.quantization is None:
        raise UsageError(
            f"--sensitivity has no use with the recipe {recipe.name}, which quantizes nothing; "
            "choose one such as w4a8"
        )
    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise UsageError(f"--out `{out}`: with --sensitivity give a file whose name ends in .json or .csv")
    if out.exists():
        raise UsageError(f"--out `{out}` exists; choose another file or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"--out `{out}`: the directory `{out.parent}` does not exist; create it first")


def _file(table: "SensitivityTable", out: Path) -> str:
    return table.to_csv() if out.suffix == ".csv" else json.dumps(table.to_json(), indent=1) + "\n"
