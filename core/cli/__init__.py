"""The `errata` command.

Each module here declares one command, or a few that belong together; what is slow to import is imported when
a command runs. Exit status: 0 for success, 1 for a failure, 2 for bad usage, 130 when interrupted. An error
is one line on stderr, which names options of the command and not their Python counterparts; `--verbose` adds
the traceback.
"""

import argparse
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from errata import __version__, quiet
from errata.cli import calibrate, compress, demo, deploy, generate, inspect, plan, report, sharing, sheet
from errata.cli.usage import Commands, OneLineParser, UsageError
from errata.errors import ErrataError
from errata.memory import keep_freed_memory

__all__ = ["main"]

# In the order of a model's life, as `errata --help` lists them.
GROUPS: Mapping[str, Sequence[Callable[[Commands], None]]] = {
    "See it work": (demo.add_parser,),
    "Make a model smaller and faster": (calibrate.add_parser, compress.add_parser, deploy.add_parser),
    "Check it and use it": (inspect.add_verify_parser, inspect.add_parser, generate.add_parser),
    "Get quality back, and measure it": (sheet.add_parser, plan.add_parser, report.add_parser),
    "Run it elsewhere, and share it": (
        deploy.add_onnx_parser,
        sharing.add_sign_parser,
        sharing.add_push_parser,
        sharing.add_pull_parser,
    ),
}
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
EXTRA_OF = {"accelerate": "text", "jinja2": "report", "matplotlib": "report", "transformers": "text"}
# Dependencies of the base installation that a machine which only runs artifacts may leave out.
ONLY_FOR_COMPRESSING = ("brevitas", "torchao")

# The stages' messages spell options as Python does, and the command as itself. Keyword: option.
OPTION_OF: Mapping[str, str] = {
    "backend": "--backend",
    "batch_size": "--batch-size",
    "device": "--device",
    "guidance_scale": "--guidance-scale",
    "max_overhead": "--max-overhead",
    "max_shard_size": "--max-shard-size",
    "modules_to_not_convert": "--keep",
    "network": "--features",
    "num_inference_steps": "--steps",
    "num_samples": "--samples",
    "on_mismatch": "--on-mismatch",
    "out": "--out",
    "preset": "--preset",
    "reference": "--reference",
    "resamples": "--resamples",
    "reuse": "--reuse",
    "samples_per_step": "--range-samples",
}
# Function of a stage: command.
COMMAND_OF: Mapping[str, str] = {
    "calibration.calibrate": "errata calibrate",
    "calibration.collect": "errata calibrate",
    "calibration.estimate": "errata calibrate",
    "compress.apply": "errata compress",
    "compress.compress": "errata compress",
    "correct.fit_sheet": "errata sheet",
    "correct.plan": "errata plan",
    "deploy.deploy": "errata deploy",
    "deploy.export": "errata deploy",
    "deploy.export_onnx": "errata export-onnx",
    "report.run": "errata report",
}
_VALUE = r"""'[^']*'|"[^"]*"|[^\s,;:()'"]+"""
_KEYWORD = re.compile(rf"(?<![\w(])`?\b({'|'.join(OPTION_OF)})=({_VALUE})`?(?![\w(])")
_ARGUMENT = re.compile(rf"`({'|'.join(OPTION_OF)})`")
_FUNCTION = re.compile(rf"`?\b(?:errata\.)?({'|'.join(map(re.escape, COMMAND_OF))})(?:\([^()]*\)|\b)`?")
# A way out that only Python has, beside one that the command has as well.
_PYTHON_ONLY = (
    (re.compile(r", sample or correct deployed\.at_steps\([^()]*\)"), ", add --on-mismatch nearest"),
    (re.compile(r"`?(?:deployed)?\.at_steps\([^()]*\)`?"), "--on-mismatch nearest"),
    (re.compile(r"\bsteps=\"none\""), "--correct none"),
    (re.compile(r"(?<=such as )steps='([^']*)'"), r"--at \1"),
    (re.compile(r" or as a Reference, such as Reference\.\w+\([^()]*\)"), ""),
    (re.compile(r" or errata\.calibration\.(?:load|merge)\b"), ""),
    (re.compile(r"(?:errata\.quality\.)?open_network\(['\"]([^'\"]*)['\"]\)"), r"--features \1"),
    (re.compile(r"\bthe teacher's UNet\b"), "the UNet of --teacher"),
    (re.compile(r"(?<=give the float pipeline) as the teacher\b"), ": --teacher PIPELINE"),
    (re.compile(r"(?:Plan\(\w+\([^()]*\)\)(?: \+ )?)+, or (?=[a-z])"), "--correct "),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = OneLineParser(
        prog="errata",
        usage="errata [-h] [-V] COMMAND ...",
        description="Make a diffusion model smaller and faster, and correct its errors while it samples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"errata {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="errata", help=argparse.SUPPRESS
    )
    listed = []
    for title, declarations in GROUPS.items():
        listed.append(f"{title}:")
        for declare in declarations:
            known = set(commands.choices)
            declare(commands)
            name = next(name for name in commands.choices if name not in known)  # an older name comes later
            summary = (commands.choices[name].description or "").removesuffix(".")
            listed.append(f"    {name:<14} {summary[:1].lower()}{summary[1:]}")
        listed.append("")
    parser.epilog = "\n".join([*listed, "`errata COMMAND --help` explains a command and its options."])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as finished:  # after --help or --version, or after an error was printed
        return finished.code if isinstance(finished.code, int) else FAILED
    args.has_own_process = argv is None
    keep_freed_memory()
    try:
        with (
            quiet.own_messages(verbose=args.verbose),
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
    except KeyboardInterrupt as stop:  # some commands say what was kept
        return _fail(str(stop) or "interrupted", INTERRUPTED)
    except UsageError as problem:
        return _fail(in_options(str(problem)), MISUSED)
    except Exception as problem:
        if args.verbose:
            traceback.print_exc()
        return _fail(_explain(problem), FAILED)
    return status


def in_options(message: str) -> str:
    """Return a message of the library with the command's options and commands in place of Python's spellings.

    `num_inference_steps=50` becomes `--steps 50`, and `errata.correct.plan(…)` becomes `errata plan`. What
    stands in a constructor, such as IEC(step_size=0.5), stays.
    """
    for pattern, replacement in _PYTHON_ONLY:
        message = pattern.sub(replacement, message)
    message = _KEYWORD.sub(_as_option, message)
    message = _ARGUMENT.sub(lambda found: OPTION_OF[found[1]], message)
    return _FUNCTION.sub(lambda found: f"`{COMMAND_OF[found[1]]}`", message)


def _as_option(found: "re.Match[str]") -> str:
    value = found[2].strip("'\"")
    return f"{OPTION_OF[found[1]]} {value}".rstrip()


def _explain(problem: Exception) -> str:
    if isinstance(problem, ErrataError):
        return in_options(str(problem))
    if isinstance(problem, OSError):
        return str(problem)
    if isinstance(problem, ModuleNotFoundError) and problem.name in EXTRA_OF:
        extra = f"errata[{EXTRA_OF[problem.name]}]"
        return f"{problem.name} is not installed; install it with: pip install '{extra}'"
    if isinstance(problem, ModuleNotFoundError) and problem.name in ONLY_FOR_COMPRESSING:
        return f"compressing needs {problem.name}, which is not installed: pip install {problem.name}"
    return f"unexpected {type(problem).__name__}: {problem} (run again with --verbose for the traceback)"


def _fail(message: str, status: int) -> int:
    print(f"errata: error: {' '.join(message.split())}", file=sys.stderr)
    return status
