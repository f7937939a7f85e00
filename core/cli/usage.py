"""Options that several commands share: how they are declared, read and checked."""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from errata import directories
from errata.errors import PlanError
from errata.presets import PRESETS

if TYPE_CHECKING:
    from errata.quality import Reference

Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"
# Copied from errata.deploy, which is slow to import; a test compares them.
BACKENDS = ("auto", "reference", "vnni", "onednn", "triton")
# torch keeps a seed in 64 bits, with a sign.
SEEDS = 2**63
# The network whose statistics of real images come with the package.
DIGIT_FEATURES = "digit-features"
# More than five times the run that is corrected is most likely a percentage: 15 for 15%.
LARGEST_OVERHEAD = 5


class UsageError(Exception):
    """The options contradict each other, or do not fit what they name."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, in the form of every other error of the program."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"errata: error: {message}; see `{self.prog} --help`\n")


def add_command(
    commands: Commands, name: str, *, summary: str, details: str, older_names: tuple[str, ...] = ()
) -> OneLineParser:
    """Declare a command with the options that all commands have, and the names that it had before."""
    parser = commands.add_parser(
        name,
        aliases=older_names,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-v", "--verbose", action="store_true", help="print more details, and tracebacks")
    return parser


def add_artifact_argument(parser: argparse.ArgumentParser, *, or_file: bool = False) -> None:
    """Declare the artifact to work on, which may be the file of a sheet or a plan."""
    files = ", or a sheet or plan" if or_file else ""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help=f"what `errata deploy` wrote{files}")


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    """Declare the seed of the noise."""
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the first image; image i has seed N + i (default: 0)",
    )


def add_preset_option(parser: argparse.ArgumentParser, *, sets: str) -> None:
    """Declare the choice of smaller numbers; `sets` says of what."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"laptop: {sets}; options that you give count more",
    )


def add_batch_size_option(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Declare the batch size."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=default,
        metavar="N",
        help=f"images per batch (default: {default})",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Declare where to run."""
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda if available)")


def usual_device() -> str:
    """Return the CUDA device of this process, or "cpu" where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    return "cuda" if local is None else f"cuda:{local}"


def is_first_process() -> bool:
    """Return whether this process prints, among those of `accelerate launch` or `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Declare the choice of kernels."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        metavar="NAME",
        help=f"kernels to run: {', '.join(BACKENDS)} (default: auto)",
    )


def add_features_option(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup", *, default: str | None
) -> None:
    """Declare the network in whose features images are compared with the reference."""
    parser.add_argument(
        "--features",
        default=default,
        metavar="NETWORK",
        help="feature network of the Fréchet distance: inception (as in the FID), inception:WEIGHTS, the "
        "folder of a transformers vision model, package.module:attribute, or digit-features, which suits "
        "the built-in model only (default: digit-features)",
    )


def open_reference(source: str, features: str, device: str | None) -> "Reference":
    """Return the reference that `--reference` names, with the network that `--features` names on the device.

    Raises:
        UsageError: the built-in reference with another network than its own.
        ReportError: either cannot be opened, or they do not fit together.
    """
    from errata import quality

    if source == "embedded" and features != DIGIT_FEATURES:
        raise UsageError(
            f"--reference embedded works only with --features {DIGIT_FEATURES}, not with {features}; give "
            "a folder, a dataset or an .npz file"
        )
    chosen = device or usual_device()
    reference = quality.Reference.open(source, quality.open_network(features).to(chosen))
    reference.network.to(chosen)  # the embedded reference brings its own
    return reference


@contextmanager
def misuse(*errors: type[Exception]) -> Iterator[None]:
    """Report these errors as errors of usage."""
    try:
        yield
    except errors as problem:
        raise UsageError(str(problem)) from problem


def read_text(path: Path) -> str:
    """Return the text of a file that an option names.

    Raises:
        UsageError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(f"`{path}` is not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem


def check_seeds(seed: int, count: int) -> None:
    """Check that every image has a seed.

    Raises:
        UsageError: the last image's seed is out of range.
    """
    if seed + count > SEEDS:
        raise UsageError(f"--seed {seed} is too large for {count} images; the largest is {SEEDS - count}")


def check_new_file(out: Path) -> None:
    """Check, before long work, that a plan or a sheet can be written to a new file.

    Raises:
        PlanError: the file exists, its folder does not or cannot be written, or it would lie inside an
            artifact.
    """
    from errata.deploy.manifest import MANIFEST_FILE

    # An artifact's folder and those of its components, where any further file makes `errata verify` fail.
    for folder in out.absolute().parents[:2]:
        if (folder / MANIFEST_FILE).is_file():
            raise PlanError(
                f"`{out}` would lie inside the artifact `{folder}`, which holds only the files that its "
                "manifest lists; choose a file outside of it"
            )
    directories.check_new_file(out, error=PlanError)


def seed(text: str) -> int:
    """Read a seed that torch accepts."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number < SEEDS:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from 0 to 2**63 - 1")
    return number


def positive(text: str) -> int:
    """Read a whole number above zero."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above zero")
    return number


def whole(text: str) -> int:
    """Read a whole number of 0 or more."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number of 0 or more")
    return int(text)


def several(text: str) -> int:
    """Read a whole number of 2 or more."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"`{text}` is too few; give at least 2")
    return number


def eight_or_more(text: str) -> int:
    """Read a whole number of 8 or more."""
    number = positive(text)
    if number < 8:
        raise argparse.ArgumentTypeError(f"`{text}` is too few; give at least 8")
    return number


def finite(text: str) -> float:
    """Read a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number")
    return number


def switch(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"`{text}` is neither true nor false")
    return text.lower() == "true"


def overhead(text: str) -> float:
    """Read a budget for extra computation: a fraction such as 0.15, or a percentage such as 15%."""
    try:
        number = finite(text.removesuffix("%").strip())
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number or percentage") from None
    fraction = number / 100 if text.endswith("%") else number
    if fraction < 0:
        raise argparse.ArgumentTypeError(f"`{text}` is below 0")
    if fraction > LARGEST_OVERHEAD:
        raise argparse.ArgumentTypeError(
            f"`{text}` means {fraction:,.0%} of extra computation, and the limit is {LARGEST_OVERHEAD:.0%}; "
            "for 15 percent write 0.15 or 15%"
        )
    return fraction
