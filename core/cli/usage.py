"""How options are declared, shared and refused."""

import argparse
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"


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


def positive(text: str) -> int:
    """An option's value that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above zero")
    return number
