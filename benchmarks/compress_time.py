"""Time the search for activation ranges, and its memory, in this build and in another one, in turn.

    python benchmarks/compress_time.py --work runs/compress_time --other PATH_OF_ANOTHER_CHECKOUT
    python benchmarks/compress_time.py --work runs/compress_time --model latent --steps 2 --trajectories 2

`--model cifar` is the architecture of DDPM-CIFAR10, 35.7 million parameters; `latent` is a smaller Stable
Diffusion, with 4096 tokens and two rows a sample. Weights are random. Inputs are recorded from a tiny network
of the same shapes: neither time nor memory depends on them. Each measurement is a process of its own, and
rounds alternate between builds. The other build looks at `--sampled` steps only, as each of its steps takes
the same time; this one at all. Seconds are CPU time of the process, without imports and without making the
network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compress_cifar import ARCHITECTURE
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from errata.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
# A third of Stable Diffusion 1.5: narrower, as deep.
LATENT = {
    "sample_size": 64,
    "block_out_channels": (192, 384, 768, 768),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "cifar": {**ARCHITECTURE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "latent": {
        **LATENT,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 32,
    },
}


def main() -> None:
    """Measure one case, or all in turn."""
    options = parsed()
    if options.measure is not None:
        print(json.dumps(measured(options, options.measure)))
        return
    record(options)
    builds = {"this build": ROOT} | ({} if options.other is None else {"other build": options.other})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    for _ in range(options.rounds):
        for name, root in builds.items():
            found[name].append(run(root, options, options.steps if root == ROOT else options.sampled))
    print(f"{describe_machine()}; torch {torch.__version__}, {options.threads} threads")
    print(f"{options.model}: {options.steps} steps, {options.trajectories} trajectories; CPU seconds")
    for name, rounds in found.items():
        print(line(name, rounds, options.steps))
    if options.other is not None:
        this, other = (median(each["cpu"] for each in found[name]) for name in builds)
        print(f"other / this: {other / this:.1f}")


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Time and memory of activation ranges.")
    parser.add_argument("--work", type=Path, required=True, help="folder for recorded inputs")
    parser.add_argument(
        "--model", choices=tuple(TINY), default="cifar", help="architecture (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument("--trajectories", type=int, default=64, help="recorded (default: %(default)s)")
    parser.add_argument("--other", type=Path, help="checkout of another version, to compare with")
    parser.add_argument(
        "--sampled", type=int, default=3, help="steps of the other build (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def line(name: str, rounds: list[dict[str, float]], steps: int) -> str:
    """Return the seconds of all steps, and what a step takes, as text."""
    cpu, wall = (median(each[key] for each in rounds) for key in ("cpu", "wall"))
    peak = max(each["gib"] for each in rounds)
    runs = " ".join(f"{each['cpu'] * steps:.0f}" for each in rounds)
    return (
        f"{name:12} {cpu * steps:8.1f} s ({runs}), {cpu:.2f} s a step, {wall:.2f} s by the clock; "
        f"memory {rounds[0]['before']:.2f} GiB before, {peak:.2f} at peak"
    )


def record(options: argparse.Namespace) -> None:
    """Record the inputs, once."""
    from errata import calibration
    from errata.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

    folder = folder_of(options)
    if (folder / "calibration.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    arguments: dict[str, Any] = {}
    if options.model == "cifar":
        from diffusers import DDIMPipeline

        pipe: Any = DDIMPipeline(unet=UNet2DModel(**TINY["cifar"]).eval(), scheduler=DDIMScheduler())
    else:
        from diffusers import AutoencoderKL

        pipe = ClassConditionalLDMPipeline(
            unet=UNet2DConditionModel(**TINY["latent"]).eval(),
            vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=64),
            scheduler=DDIMScheduler(clip_sample=False),
            class_embedder=ClassEmbedder(num_classes=10, embedding_dim=768),
        )
        labels = [{"class_labels": [number % 10]} for number in range(options.trajectories)]
        arguments = {"inputs": labels, "guidance_scale": 7.5}
    calibration.calibrate(
        pipe,
        folder,
        num_inference_steps=options.steps,
        num_samples=options.trajectories,
        batch_size=1 if arguments else 32,
        **arguments,
    )


def folder_of(options: argparse.Namespace) -> Path:
    """Return where the inputs lie."""
    folder: Path = options.work / f"{options.model}-{options.steps}-{options.trajectories}"
    return folder


def run(root: Path, options: argparse.Namespace, count: int) -> dict[str, float]:
    """Return what a process with the `errata` of that checkout measures."""
    command = [
        sys.executable, __file__, "--work", str(options.work), "--model", options.model,
        "--steps", str(options.steps), "--trajectories", str(options.trajectories),
        "--threads", str(options.threads), "--measure", str(count),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root / ".typecheck"), "TQDM_DISABLE": "1"}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(options: argparse.Namespace, count: int) -> dict[str, float]:
    """Return seconds a step over so many steps, and memory before and at its peak."""
    from errata import calibration
    from errata.compress import Recipe
    from errata.compress.quantize.observation import observe_ranges
    from errata.machine import metered
    from errata.runtime.scheme import Scheme

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    is_cifar = options.model == "cifar"
    unet = (UNet2DModel(**ARCHITECTURE) if is_cifar else UNet2DConditionModel(**LATENT)).eval()
    recorded = calibration.load(folder_of(options))
    scheme = Scheme.of(unet, Recipe.named("w8a8"), branch=0)
    steps = [place * options.steps // count for place in range(count)]
    device = torch.device("cpu")
    with metered(device) as idle:
        cpu, wall = time.process_time(), time.perf_counter()
    with metered(device) as busy:
        observe_ranges(unet, recorded, scheme, steps=steps)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    before, most = ((reading.peak_bytes or 0) / 2**30 for reading in (idle, busy))
    return {"cpu": cpu / count, "wall": wall / count, "before": before, "gib": most}


if __name__ == "__main__":
    main()
