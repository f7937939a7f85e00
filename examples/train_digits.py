"""Train the embedded demo model: 16x16 handwritten digits, 1.6 M parameters, under an hour on a CPU.

    pip install scikit-learn
    python examples/train_digits.py --out runs/digits --minutes 38

The data are the 1797 scanned digits that ship inside scikit-learn (8x8 pixels, values 0 to 16; the
test part of the UCI "Optical Recognition of Handwritten Digits" set, Alpaydin and Kaynak 1998,
CC BY 4.0). They are enlarged to 16x16 with bicubic interpolation. Half of the drawn images are also
rotated by up to 6 degrees and shifted by up to one pixel.
"""

import argparse
import logging
import math

import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from training import BatchSource, add_training_options, run_training

RESOLUTION = 16
SOURCE_MAXIMUM = 16  # scikit-learn counts the inked pixels of 4x4 blocks
MAXIMUM_ROTATION = math.radians(6)
MAXIMUM_SHIFT = 2 / RESOLUTION  # one pixel in grid coordinates, which span 2
AUGMENTED_SHARE = 0.5
DATA = {
    "name": "scikit-learn digits",
    "source": "UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0",
    "images": 1797,
    "preparation": "8x8 values 0..16, bicubic to 16x16, clamped, scaled to [-1, 1]",
    "augmentation": "half of the drawn images: rotation up to 6 degrees, shift up to 1 pixel",
}


def make_unet() -> UNet2DModel:
    """Return the untrained network (about 1.6 million parameters)."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
    )


def load_scans() -> tuple[Tensor, Tensor]:
    """Return the scans, (1797, 1, 8, 8) float32 in [0, 1], and their classes, (1797,) int64."""
    digits = load_digits()
    scans = torch.from_numpy(digits.images).float().unsqueeze(1) / SOURCE_MAXIMUM
    return scans, torch.from_numpy(digits.target).long()


def enlarge(scans: Tensor, *, angles: Tensor | None = None, shifts: Tensor | None = None) -> Tensor:
    """Return scans (B, 1, 8, 8) as images (B, 1, 16, 16), float32 in [0, 1], moved if asked.

    angles: (B,), radians. shifts: (B, 2), grid units. Enlarging and moving are one interpolation,
    so a moved image is no blurrier than a still one.
    """
    angles = torch.zeros(len(scans)) if angles is None else angles
    shifts = torch.zeros(len(scans), 2) if shifts is None else shifts
    cos, sin = angles.cos(), angles.sin()
    rows = torch.stack([cos, -sin, shifts[:, 0], sin, cos, shifts[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(scans), 1, RESOLUTION, RESOLUTION], align_corners=False)
    images = F.grid_sample(scans, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return images.clamp(0, 1)


def make_batch_source(scans: Tensor) -> BatchSource:
    """Return a function that draws augmented images with replacement, scaled to [-1, 1]."""

    def draw_batch(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(scans), (count,), generator=generator)
        moved = (torch.rand(count, generator=generator) < AUGMENTED_SHARE).float()
        angles = (2 * torch.rand(count, generator=generator) - 1) * MAXIMUM_ROTATION * moved
        shifts = (2 * torch.rand(count, 2, generator=generator) - 1) * MAXIMUM_SHIFT * moved[:, None]
        return 2 * enlarge(scans[chosen], angles=angles, shifts=shifts) - 1

    return draw_batch


def main() -> None:
    """Train on the CPU and write the folder."""
    parser = argparse.ArgumentParser(description="Train the embedded digits model.")
    add_training_options(parser, steps=10_000, batch_size=64)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    scans, _ = load_scans()
    run_training(
        options,
        make_unet(),
        make_batch_source(scans),
        data=DATA,
        device=torch.device("cpu"),
        packages=("torch", "diffusers", "scikit-learn"),
    )


if __name__ == "__main__":
    main()
