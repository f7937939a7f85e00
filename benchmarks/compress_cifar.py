"""Time w8a8 compression of the DDPM-CIFAR10 architecture: 35.7 million parameters, random weights.

    python benchmarks/compress_cifar.py --work runs/compress_cifar [--steps 100] [--trajectories 64]

Prints the seconds of calibration and of compression. Both resume where they were stopped, and
`seconds.json` in the work directory adds up the time of interrupted runs. The cost of learned rounding is
printed block by block on stderr:

    python benchmarks/compress_cifar.py --work runs/compress_cifar --steps 4 --recipe w4a8-learned \\
        --only down_blocks.0.resnets.0 mid_block.resnets.0 up_blocks.3.resnets.2
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention

from errata import calibration, compress
from errata.calibration import CalibrationSet
from errata.compress import Recipe
from errata.machine import describe_machine

# google/ddpm-cifar10-32: https://huggingface.co/google/ddpm-cifar10-32/blob/main/config.json
ARCHITECTURE = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
BATCH_SIZE = 32
GOAL_SECONDS = 20 * 60


def main() -> None:
    """Run what is not finished yet, and print the seconds."""
    parser = argparse.ArgumentParser(description="Time compression of the DDPM-CIFAR10 architecture.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=64,
        help="recorded trajectories to calibrate on (default: %(default)s)",
    )
    parser.add_argument("--recipe", default="w8a8", help="recipe to time (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="MODULE", help="quantize only the layers inside these modules"
    )
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("errata").setLevel(logging.INFO)
    options.work.mkdir(parents=True, exist_ok=True)
    seconds = Seconds(options.work / "seconds.json")
    pipe = cifar_pipeline()
    recording = calibrate(pipe, options, seconds)
    part = "-part" if options.only else ""
    out = options.work / f"{options.recipe}{part}-{options.steps}-{options.trajectories}"
    recipe = recipe_of(pipe.unet, options)
    if not out.exists():
        with seconds.counted(out.name):
            compress.compress(pipe, recording, recipe, out, samples_per_step=options.trajectories)
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    parameters = sum(value.numel() for value in pipe.unet.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {options.steps} steps, {options.trajectories} trajectories")
    print(f"calibration  {seconds.of(recording.path.name):8.1f} s")
    print(f"compression  {seconds.of(out.name):8.1f} s  ({options.recipe}; the goal is {GOAL_SECONDS} s)")


def recipe_of(unet: UNet2DModel, options: argparse.Namespace) -> Recipe:
    """The recipe; with `--only`, for those modules: what learned rounding of a block costs, for instance."""
    recipe = Recipe.named(options.recipe)
    if not options.only:
        return recipe
    assert recipe.quantization is not None
    kept = tuple(
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | Attention)
        and not any(name == only or name.startswith(f"{only}.") for only in options.only)
    )
    return replace(recipe, quantization=replace(recipe.quantization, modules_to_not_convert=kept))


def cifar_pipeline(*, head_width: int | None = None) -> DDIMPipeline:
    """The architecture with weights of a fixed seed; its attentions have one head, or heads of that width."""
    torch.manual_seed(0)
    unet = UNet2DModel(**{**ARCHITECTURE, "attention_head_dim": head_width})
    pipe = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calibrate(pipe: DDIMPipeline, options: argparse.Namespace, seconds: Seconds) -> CalibrationSet:
    """The trajectories, collected if they are not there."""
    folder = options.work / f"calibration-{options.steps}-{options.trajectories}"
    if (folder / "calibration.json").exists():
        return calibration.load(folder)
    with seconds.counted(folder.name):
        return calibration.calibrate(
            pipe,
            folder,
            num_inference_steps=options.steps,
            num_samples=options.trajectories,
            batch_size=min(BATCH_SIZE, options.trajectories),
        )


class Seconds:
    """Seconds by name, kept in a file and added up over runs, interrupted ones included."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, name: str) -> float:
        """What that took in all."""
        return self._seconds.get(name, 0.0)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Adds what the body takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self.of(name) + time.monotonic() - start
            self._file.write_text(json.dumps(self._seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
