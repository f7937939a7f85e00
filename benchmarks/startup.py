"""Time whole commands, each in a process of its own: what starting costs, on top of the work.

    python benchmarks/startup.py ARTIFACT [--against COMMAND] [--steps 4] [--rounds 5]

`verify`, `inspect`, and `generate` of one image run in turn, and so does each with the `errata` of another
environment (`--against`), so that a drift in the machine's speed cancels in the ratios. A first round, which
compiles Python files and fills disk caches, is not counted. Prints the median CPU seconds (user and system,
of the process and its children), the median wall seconds, and the median ratio of the CPU seconds of a round
to those of the other environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.machine import describe_machine


@dataclass(frozen=True)
class Spent:
    """What one command took, in seconds."""

    cpu: float
    wall: float


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Time whole commands from their start.")
    parser.add_argument("artifact", type=Path, help="artifact to check and to sample")
    parser.add_argument("--against", metavar="COMMAND", help="`errata` of another environment")
    parser.add_argument(
        "--steps", type=int, default=4, help="sampling steps of the image (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    options = parser.parse_args()
    programs = {"here": [sys.executable, "-m", "errata.cli"]}
    if options.against:
        programs["there"] = [options.against]
    with tempfile.TemporaryDirectory() as folder:
        spent = measure(programs, commands(options.artifact, options.steps, Path(folder)), options.rounds)
    print(
        f"{describe_machine()}; {options.rounds} rounds, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    )
    print(f"{'command':<24} {'CPU s':>8} {'wall s':>8} {'CPU ratio':>10}")
    for (program, command), each in spent.items():
        print(f"{f'{command}, {program}':<24} {row(each, spent.get(('there', command)))}")


def commands(artifact: Path, steps: int, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of each command by its name; `{out}` stands for a new directory."""
    image = ["--images", "1", "--steps", str(steps), "--on-mismatch", "nearest"]
    return {
        "verify": ["verify", str(artifact)],
        "inspect": ["inspect", str(artifact)],
        "generate": ["generate", str(artifact), *image, "--out", str(folder / "{out}")],
    }


def measure(
    programs: Mapping[str, Sequence[str]], commands: Mapping[str, Sequence[str]], rounds: int
) -> dict[tuple[str, str], list[Spent]]:
    """Return what each command of each program took, round by round, without the first."""
    spent: dict[tuple[str, str], list[Spent]] = {
        (program, command): [] for command in commands for program in programs
    }
    for number in range(rounds + 1):
        for (program, command), each in spent.items():
            words = [*programs[program], *commands[command]]
            took = run([word.replace("{out}", f"{program}-{number}") for word in words])
            if number:
                each.append(took)
    return spent


def run(words: Sequence[str]) -> Spent:
    """Run a command, and return what it took.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"{' '.join(words)} failed: {told.read().decode(errors='replace')[-2000:]}")
    return Spent(cpu=usage.ru_utime + usage.ru_stime, wall=wall)


def row(each: Sequence[Spent], others: Sequence[Spent] | None) -> str:
    """Return the medians as a row of the table."""
    cpu, wall = (statistics.median(getattr(one, name) for one in each) for name in ("cpu", "wall"))
    text = f"{cpu:>8.2f} {wall:>8.2f}"
    if others is None:
        return text
    ratio = statistics.median(one.cpu / other.cpu for one, other in zip(each, others, strict=True))
    return f"{text} {ratio:>10.3f}"


if __name__ == "__main__":
    main()
