"""Compare what `calibrate` and `compress` say before they begin with what they take, on the embedded model.

    python benchmarks/estimates.py --work DIR [--steps 25] [--samples 256] [--recipe w8a8]

Times are CPU seconds of one thread, in the estimate too, so that other work on the machine does not count.
Peak memory is the process's, and each part runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from errata import calibration, compress
from errata.embedded import PIPELINE
from errata.estimates import Estimate, stored_size
from errata.memory import peak_memory


def main() -> None:
    """Run both parts and print a table."""
    options = parse()
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options)))
        return
    for part in PARTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for quantity, (said, taken) in json.loads(answer.splitlines()[-1]).items():
            print(f"{part:<10} {quantity:<12} {said:12.4g} {taken:12.4g} {said / taken:8.3f}", flush=True)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--part", choices=("calibrate", "compress"))
    return parser.parse_args()


def calibrated(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return pairs of what is said and what is taken, for `calibrate`."""
    pipe, out = opened(), options.work / "calibration"
    sizes = {"num_inference_steps": options.steps, "num_samples": options.samples}
    said = calibration.estimate(pipe, out, **sizes)
    start = time.process_time()
    calibration.calibrate(pipe, out, batch_size=said.batch_size, **sizes)
    return pairs(said, time.process_time() - start, stored_size(out))


def compressed(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return pairs of what is said and what is taken, for `compress`."""
    pipe, out = opened(), options.work / "compressed"
    recorded = calibration.load(options.work / "calibration")
    said = compress.estimate(pipe, recorded, options.recipe, out)
    start = time.process_time()
    compress.compress(pipe, recorded, options.recipe, out)
    return pairs(said, time.process_time() - start, stored_size(out))


def opened():
    """Return the embedded pipeline; from here on, one thread, and the clock shows CPU seconds."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    return calibration.load_pipeline(PIPELINE)


def pairs(said: Estimate, seconds: float, stored: int) -> dict[str, tuple[float, float]]:
    """Return both figures of each quantity."""
    return {
        "seconds": (said.seconds, seconds),
        "disk bytes": (said.disk_bytes, stored),
        "peak bytes": (said.memory_bytes or 0, peak_memory()),
    }


PARTS = {"calibrate": calibrated, "compress": compressed}

if __name__ == "__main__":
    main()
