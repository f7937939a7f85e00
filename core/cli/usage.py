"""How options are declared, shared and refused."""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"
# Those of errata.deploy, which would be slow to import here; a test compares them.
BACKENDS = ("auto", "reference", "vnni", "onednn", "triton")
# torch keeps a seed in 64 bits, with a sign.
SEEDS = 2**63


class UsageError(Exception):
    """The options do not fit together, or not with what they name."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, in the form of every other error of the program."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"errata: error: {message}; see `{self.prog} --help`\n")


def add_command(commands: Commands, name: str, *, summary: str, details: str) -> OneLineParser:
    """Declare a command with the options that all have."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks")
    return parser


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    """Declare the seed of the noise."""
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of image 0, image i has seed N + i (default: 0)",
    )


def add_batch_size_option(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Declare how many images are made at a time."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=default,
        metavar="N",
        help=f"images per batch (default: {default})",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Declare where to run."""
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")


def usual_device() -> str:
    """CUDA where there is one; of several processes each has its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    return "cuda" if local is None else f"cuda:{local}"


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Declare the choice of kernels."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        metavar="NAME",
        help=f"kernels: {', '.join(BACKENDS)} (default: auto)",
    )


@contextmanager
def misuse(*errors: type[Exception]) -> Iterator[None]:
    """Blame the options for these errors."""
    try:
        yield
    except errors as problem:
        raise UsageError(str(problem)) from problem


def read_text(path: Path) -> str:
    """The contents of a file that an option names.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(f"`{path}` is not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem


def check_seeds(seed: int, count: int) -> None:
    """Refuse a seed that leaves its last images without one.

    Raises:
        UsageError: the last image's seed is out of range.
    """
    if seed + count > SEEDS:
        raise UsageError(f"--seed {seed} is too large for {count} images; give at most {SEEDS - count}")


def seed(text: str) -> int:
    """An option's value that a torch generator takes."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number < SEEDS:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from 0 to 2**63 - 1")
    return number


def positive(text: str) -> int:
    """An option's value that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above zero")
    return number


def whole(text: str) -> int:
    """An option's value that may be 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number of 0 or more")
    return int(text)


def several(text: str) -> int:
    """An option's value that counts what is compared with each other."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"`{text}` is too few; give at least 2")
    return number


def finite(text: str) -> float:
    """An option's value that is a number, neither infinite nor none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number")
    return number


def switch(text: str) -> bool:
    """An option's value that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"`{text}` is neither true nor false")
    return text.lower() == "true"


def budget(text: str) -> float:
    """An option's value of 0 or more."""
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"`{text}` is below 0")
    return number
