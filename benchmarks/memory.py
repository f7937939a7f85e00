"""Measure peak memory of calibration and compression by number of samples: it must not grow.

    python benchmarks/memory.py --work runs/memory [--samples 64 128 256 512 1024] [--steps 4]

Every measurement is the largest resident set of a fresh process. Each is repeated, because the allocator and
the system vary by hundreds of megabytes. On the embedded model, with few steps:

    calibrate   `collect`, in batches of 64
    ranges      w8a8, activation ranges chosen on all samples
    rounding    w4a8-learned on as many inputs as samples, few iterations

Prints medians and ranges, writes `memory.json` and the plot `memory.png` (with the extra `report`) to the
work directory, and resumes where it was stopped. Pages of memory-mapped files count as resident until the
system takes them back, so a calibration set that is read from disk may show; here it is small.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from errata.machine import describe_machine

COLUMNS = ("calibrate", "ranges", "rounding")
BATCH_SIZE = 64
# Memory does not depend on how long a block is learned; a few iterations touch everything.
ITERATIONS = 3


def main() -> None:
    """Measure what is not measured yet; print, plot."""
    parser = argparse.ArgumentParser(description="Peak memory against the number of samples.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024],
        help="numbers of samples (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes per measurement (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=2, metavar=("COLUMN", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one is not None:
        measure(options.work, options.one[0], int(options.one[1]), options.steps)
        return
    peaks = Peaks(options.work / "memory.json")
    for samples in options.samples:
        for column in COLUMNS:
            while len(peaks.get(column, samples, options.steps)) < options.repeats:
                peaks.add(column, samples, options.steps, peak_of(options, column, samples))
    print(
        f"{describe_machine()}; embedded model, {options.steps} steps; peak resident memory in MB, "
        f"median of {options.repeats} (least-most)"
    )
    print(f"{'samples':>8}" + "".join(f"{column:>20}" for column in COLUMNS))
    for samples in options.samples:
        cells = [cell(peaks.get(column, samples, options.steps)) for column in COLUMNS]
        print(f"{samples:>8}" + "".join(f"{text:>20}" for text in cells))
    plot(peaks, options)


def cell(values: list[int]) -> str:
    """Median, least and most as text."""
    least, most = min(values) / 1e6, max(values) / 1e6
    return f"{statistics.median(values) / 1e6:.0f} ({least:.0f}-{most:.0f})"


class Peaks:
    """Bytes by column, samples and steps, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._peaks: dict[str, list[int]] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, column: str, samples: int, steps: int) -> list[int]:
        """What is measured so far."""
        return self._peaks.get(f"{column}/{samples}/{steps}", [])

    def add(self, column: str, samples: int, steps: int, peak: int) -> None:
        """Written down at once."""
        self._peaks.setdefault(f"{column}/{samples}/{steps}", []).append(peak)
        self._file.write_text(json.dumps(self._peaks, indent=1) + "\n")


def peak_of(options: argparse.Namespace, column: str, samples: int) -> int:
    """Peak resident bytes of a process that does nothing else."""
    command = [sys.executable, __file__, "--work", str(options.work), "--steps", str(options.steps)]
    print(f"measuring {column} with {samples} samples", file=sys.stderr)
    done = subprocess.run(
        [*command, "--one", column, str(samples)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    return int(done.stdout.splitlines()[-1])


def measure(work: Path, column: str, samples: int, steps: int) -> None:
    """Does the work of one measurement and prints the peak."""
    from errata import calibration, compress
    from errata.embedded import PIPELINE

    pipe = calibration.load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    folder = work / f"calibration-{samples}-{steps}"
    if column == "calibrate":
        remove(folder)
        calibration.calibrate(
            pipe, folder, num_inference_steps=steps, num_samples=samples, batch_size=BATCH_SIZE
        )
    else:
        recording = calibration.load(folder)
        recipe = "w8a8"
        if column == "rounding":
            recipe = f"w4a8-learned:iterations={ITERATIONS},samples={samples},batch_size=32"
        out = work / f"{column}-{samples}-{steps}"
        remove(out)
        remove(out.with_name(f"{out.name}.partial"))
        compress.compress(
            pipe, recording, recipe, out, samples_per_step=samples if column == "ranges" else 64
        )
    unit = 1 if sys.platform == "darwin" else 1024
    print(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def remove(folder: Path) -> None:
    """What an earlier, interrupted measurement left."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def plot(peaks: Peaks, options: argparse.Namespace) -> None:
    """A line for each column; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'errata[report]'", file=sys.stderr)
        return
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for column in COLUMNS:
        measured = [peaks.get(column, samples, options.steps) for samples in options.samples]
        (line,) = axes.plot(
            options.samples, [statistics.median(values) / 1e6 for values in measured], label=column
        )
        for samples, values in zip(options.samples, measured, strict=True):
            axes.plot([samples] * len(values), [v / 1e6 for v in values], "o", color=line.get_color(), ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(options.samples, [str(samples) for samples in options.samples])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("samples")
    axes.set_ylabel("peak resident memory, MB")
    axes.legend()
    figure.savefig(options.work / "memory.png", dpi=120)
    print(f"plot: {options.work / 'memory.png'}")


if __name__ == "__main__":
    main()
