"""Measure how an artifact's steps amplify errors, where IEC contracts, and how errors grow along a run.

    python benchmarks/amplification.py ARTIFACT --out DIR [--samples 4] [--steps all] [--float PIPELINE]
    python benchmarks/amplification.py ARTIFACT --out DIR --steps 0,50,99 --smooth CACHE_ONLY_ARTIFACT

Writes `amplification.json` and `amplification.png` (Fig. 1 of "Iterative Error Correction") into DIR, and
with `--float`, the pipeline that the artifact came from, `trajectory.json` and `trajectory.png` (Fig. 2).

`--smooth` compares displacements instead: norms of a quantized artifact from finite differences of several
lengths, and norms of an artifact of the same model without quantizers from gradients, at the same samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from errata import calibration, deploy
from errata.correct import Plan
from errata.correct.analysis import Amplification, TrajectoryError, amplification, trajectory_error
from errata.correct.analysis.probe import jacobian_norms, lanczos_norms
from errata.correct.analysis.watch import arguments_for, probes_of
from errata.correct.sampling import default_inputs
from errata.correct.steps import select
from errata.deploy import DeployedPipeline
from errata.machine import describe_machine

DIFFERENCES = (0.03, 0.1, 0.3, 1.0)


def main() -> None:
    """Measure, write the files and print a summary."""
    parser = argparse.ArgumentParser(description="Amplification of errors by sampling steps.")
    parser.add_argument("artifact", type=Path, help="artifact to measure")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--samples", type=int, default=4, help="samples to average over (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        default="all",
        help="steps to measure, as in a plan: all, 0,50,99, ends:1/10, … (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument(
        "--float",
        dest="pipeline",
        metavar="PIPELINE",
        help="also draw the trajectory error, against this float pipeline",
    )
    parser.add_argument(
        "--smooth",
        type=Path,
        metavar="ARTIFACT",
        help="instead, compare displacements with this artifact without quantizers",
    )
    options = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    options.out.mkdir(parents=True, exist_ok=True)
    deployed = deploy.load(options.artifact)
    if options.smooth is not None:
        compare_displacements(deployed, deploy.load(options.smooth), options)
        return
    found = amplification(deployed, steps=options.steps, samples=options.samples, seed=options.seed)
    write(found, options.out / "amplification")
    describe(found)
    if options.pipeline is not None:
        pipe = calibration.load_pipeline(options.pipeline)
        # Where the paper corrects, and at every step of an artifact without a cache.
        plans = {"IEC, K = 1": Plan.paper(deployed)}
        errors = trajectory_error(deployed, pipe, plans=plans, samples=16, seed=options.seed)
        write(errors, options.out / "trajectory")
        describe_errors(errors)


def compare_displacements(deployed: DeployedPipeline, smooth: DeployedPipeline, options: Any) -> None:
    """Print ‖A + B J‖ and ‖∇G‖ at λ = 0.5, one line a step and way to measure."""
    arguments = arguments_for(deployed.pipe, range(options.samples), seed=options.seed, inputs=default_inputs)
    chosen = frozenset(select(options.steps, deployed.schedule))
    for probe in probes_of(deployed, arguments, chosen, batch_size=128):
        a, b = probe.coefficients()
        pairs = [(a, b), (0.5, 0.5 * b)]
        generator = torch.Generator().manual_seed(0)
        by_gradients, _ = lanczos_norms(
            replace(probe, denoiser=smooth.denoiser),
            pairs,
            0.02 * probe.rms,
            iterations=60,
            generator=generator,
        )
        print_norms(probe.step, "gradients, no quantizers", by_gradients)
        for difference in DIFFERENCES:
            found = jacobian_norms(probe, pairs, difference * probe.rms)
            print_norms(probe.step, f"difference of {difference:g}", found)


def print_norms(step: int, name: str, norms: torch.Tensor) -> None:
    """One line."""
    step_norm, refinement = norms.mean(dim=0).tolist()
    print(f"call {step:>4}  {name:<26} |A+BJ| {step_norm:.4f}   |grad G| {refinement:.4f}", flush=True)


def write(found: Amplification | TrajectoryError, path: Path) -> None:
    """The numbers as JSON, and the picture."""
    path.with_suffix(".json").write_text(json.dumps(found.to_json()) + "\n")
    found.plot(path.with_suffix(".png"))


def describe(found: Amplification) -> None:
    """Print a summary, and every tenth step."""
    kind = "lower bounds" if found.is_bound else "norms"
    print(f"method {found.method}, difference {found.difference:g}, {kind}")
    for name, values in [("|A+BJ|", found.propagation)] + [
        (f"|grad G| at {size:g}", values) for size, values in found.refinement.items()
    ]:
        mean, highest = values.mean, max(values.high)
        above = sum(value > 1 for value in mean)
        print(
            f"{name:<16} mean {statistics.fmean(mean):.4f}, from {min(mean):.4f} to {max(mean):.4f}, highest "
            f"sample {highest:.4f}; above 1 at {above} of {len(mean)} steps"
        )
    columns = [found.propagation.mean, *(values.mean for values in found.refinement.values())]
    for row in sorted({*range(0, len(found.steps), 10), *range(len(found.steps))[-3:]}):
        print(f"call {found.steps[row]:>4}", " ".join(f"{column[row]:.4f}" for column in columns))


def describe_errors(errors: TrajectoryError) -> None:
    """Print the relative errors at some steps."""
    last = len(errors.timesteps) - 1
    for name, values in errors.relative.items():
        shown = " ".join(
            f"{values.mean[i]:.4f}" for i in sorted({0, last // 4, last // 2, 3 * last // 4, last})
        )
        print(f"{name:<14} relative error after steps 0, 1/4, 1/2, 3/4, all: {shown}")


if __name__ == "__main__":
    main()
