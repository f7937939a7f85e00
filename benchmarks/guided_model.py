"""A small class-conditional model of handwritten digits, sampled with guidance, and its artifacts.

It is trained on first use: 8x8 pixels, 0.7 million parameters, minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn
from work_folder import CALIBRATION_SAMPLES, CALIBRATION_SEED, recorded, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_digits import enlarge, load_scans
from training import BatchSource, TrainingPlan, TrainingResult, make_scheduler, train

from errata import calibration, compress, deploy
from errata.directories import staged_directory
from errata.errors import ErrataError
from errata.pipelines import ClassConditionalLDMPipeline

CLASSES = 10
NO_CLASS = CLASSES
RESOLUTION = 8
# Ho and Salimans, "Classifier-free diffusion guidance" (2022), find 0.1 and 0.2 better than 0.5.
DROPPED_LABELS = 0.1


class Labelled(nn.Module):
    """The network with the labels of the batch that is trained on: `train` hands it images and times only."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        self.labels = torch.zeros(0, dtype=torch.int64)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Any:
        """Return the network's output; noisy: (B, 1, 8, 8), timesteps: (B,)."""
        return self.unet(noisy, timesteps, self.labels)


def make_unet() -> UNet2DModel:
    """Return the untrained network (about 0.7 million parameters)."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,
    )


def batch_source(model: Labelled) -> BatchSource:
    """Return a function that draws images, scaled to [-1, 1], and hands `model` their labels."""
    scans, labels = load_scans()

    def draw_batch(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(scans), (count,), generator=generator)
        is_dropped = torch.rand(count, generator=generator) < DROPPED_LABELS
        model.labels = labels[chosen].masked_fill(is_dropped, NO_CLASS)
        return 2 * scans[chosen] - 1

    return draw_batch


def train_model(options: argparse.Namespace) -> None:
    """Write the float pipeline, unless it is there."""
    folder: Path = options.work / "pipeline"
    if folder.is_dir():
        return
    torch.manual_seed(options.seed)
    model = Labelled(make_unet())
    plan = TrainingPlan(
        steps=options.training_steps, minutes=None, batch_size=64, learning_rate=2e-3, seed=options.seed
    )

    def save(average: Any, result: TrainingResult) -> None:
        pipe = ClassConditionalLDMPipeline(
            # Never called: what is denoised are the pixels.
            vae=AutoencoderKL(1, 1, block_out_channels=(8,), latent_channels=1, norm_num_groups=8),
            unet=average.unet.to(memory_format=torch.contiguous_format),
            scheduler=make_scheduler(),
            unconditional_label=NO_CLASS,
        )
        with staged_directory(folder, error=ErrataError) as staged:
            pipe.save_pretrained(staged, safe_serialization=True)
            write_text(options.work / "training.json", json.dumps(asdict(result)) + "\n")

    train(model, make_scheduler(), batch_source(model), plan, device=torch.device("cpu"), save=save)


def load_float(options: argparse.Namespace) -> DiffusionPipeline:
    """Return the float pipeline, silent."""
    pipe = calibration.load_pipeline(options.work / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def artifact_of(scale: float, recipe: str, options: argparse.Namespace) -> Path:
    """Return the artifact of a recipe, calibrated at a guidance scale; made unless it is there."""
    folder: Path = options.work / f"guidance-{scale:g}"
    artifact = folder / "artifacts" / recipe
    if artifact.is_dir():
        return artifact
    for kind in ("artifacts", "compressed"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    made = folder / "compressed" / recipe
    if made.is_dir():
        return deploy.deploy(compress.load(made), artifact)
    pipe = load_float(options)
    trajectories = recorded(
        pipe,
        folder / "calibration",
        steps=options.steps,
        samples=CALIBRATION_SAMPLES,
        batch_size=CALIBRATION_SAMPLES,
        seed=CALIBRATION_SEED + options.seed,
        inputs=[{"class_labels": labels_of(range(CALIBRATION_SAMPLES))}],
        guidance_scale=scale,
    )
    return deploy.deploy(compress.compress(pipe, trajectories, recipe, made), artifact)


def labels_of(indices: range) -> list[int]:
    """Return the classes that are asked for: all equally often."""
    return [index % CLASSES for index in indices]


def images_of(pixels: Tensor) -> Tensor:
    """Return drawn pixels, (B, 1, 8, 8), as images, (B, 1, 16, 16) in [0, 1], enlarged as the real digits."""
    return enlarge((pixels / 2 + 0.5).clamp(0, 1))
