"""The `errata` command.

Each command is a file here with `add_parser(commands)` and `run(args) -> int`; what is slow to import is
imported inside `run`. Exit status: 0 for success, 1 for a failure, 2 for bad usage, 130 when interrupted.
Whatever goes wrong is one line on stderr; `--verbose` adds the traceback.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from errata import __version__
from errata.cli import (
    calibrate,
    compress,
    demo,
    deploy,
    export,
    generate,
    inspect,
    plan,
    pull,
    push,
    quiet,
    report,
    sign,
    verify,
)
from errata.cli.usage import OneLineParser, UsageError
from errata.errors import ErrataError
from errata.memory import keep_freed_memory

__all__ = ["main"]

COMMANDS = (
    demo, calibrate, compress, deploy, verify, inspect, export, sign, push, pull, plan, generate, report,
)  # fmt: skip
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
EXTRA_OF = {"accelerate": "text", "jinja2": "report", "matplotlib": "report", "transformers": "text"}
# Dependencies of the base installation that a machine which only runs artifacts may leave out.
ONLY_FOR_COMPRESSING = ("brevitas", "torchao")

LIFE = """\
The life of a model: calibrate, compress, deploy, plan, then generate or report. `errata demo` shows all of
it on a small built-in model. `errata COMMAND --help` explains each command.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = OneLineParser(
        prog="errata",
        description="Compress a diffusion model, freeze it, and correct its sampling errors while it runs.",
        epilog=LIFE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"errata {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as finished:  # after --help, --version, or an error already told
        return finished.code if isinstance(finished.code, int) else FAILED
    keep_freed_memory()
    try:
        with (
            quiet.own_words(verbose=args.verbose),
            _interrupted_by_termination(),
            _no_interrupt_lost(),
        ):
            return _run(args)
    except BrokenPipeError:  # the reader has seen enough, as in `errata inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Repeat a Ctrl-C that lands in a finalizer, whose exceptions Python prints and drops."""
    before = sys.unraisablehook
    sys.unraisablehook = _interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    # Later, when the finalizer is over.
    again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def _run(args: argparse.Namespace) -> int:
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:  # with words where a command has some to say
        return _fail(str(stop) or "interrupted", INTERRUPTED)
    except UsageError as problem:
        return _fail(str(problem), MISUSED)
    except Exception as problem:
        if args.verbose:
            traceback.print_exc()
        return _fail(_explain(problem), FAILED)
    return status


def _explain(problem: Exception) -> str:
    if isinstance(problem, ErrataError | OSError):
        return str(problem)
    if isinstance(problem, ModuleNotFoundError) and problem.name in EXTRA_OF:
        extra = f"errata[{EXTRA_OF[problem.name]}]"
        return f"this needs {problem.name}, which is not installed: pip install '{extra}'"
    if isinstance(problem, ModuleNotFoundError) and problem.name in ONLY_FOR_COMPRESSING:
        return f"compressing needs {problem.name}, which is not installed: pip install {problem.name}"
    return f"unexpected {type(problem).__name__}: {problem} (run again with --verbose for the traceback)"


def _fail(message: str, status: int) -> int:
    print(f"errata: error: {' '.join(message.split())}", file=sys.stderr)
    return status
