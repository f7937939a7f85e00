"""Train the larger example model: CIFAR-10 photographs, 32x32 in colour, 6.1 M parameters.

On a GPU, which it uses if there is one:

    python examples/train_cifar10.py --data path/to/train.parquet --out runs/cifar10 --minutes 25

On one CPU core it takes hours, so run it in the background. `kill` with its process id stops it with a
checkpoint. The same command continues from there, on the same learning rate schedule:

    OMP_NUM_THREADS=1 nohup nice -n 19 python examples/train_cifar10.py --data path/to/train.parquet \\
        --held-out path/to/test.parquet --out runs/cifar10 --checkpoints runs/cifar10-checkpoints \\
        --steps 20000 --batch-size 64 --learning-rate 1e-3 --ema-decay 0.9995 --threads 1 \\
        --mixed-precision --no-channels-last --snapshot-minutes 10 > runs/cifar10.log 2>&1 &

It writes the averaged weights to `--out` every ten minutes, and the loss on held-out images to
`evaluation.jsonl` beside the checkpoint. `--mixed-precision` was 1.5 times as fast on a CPU
with bfloat16 instructions (`amx_bf16` in /proc/cpuinfo). Without `--checkpoints` nothing can be continued.
The parquet files have a column of encoded images and a column of labels. `--label` keeps the images of one
class. One class and a smaller network make a model of photographs in an hour of one core:

    OMP_NUM_THREADS=1 python examples/train_cifar10.py --data path/to/train.parquet --label 7 \\
        --channels 32 64 64 --out runs/horses --minutes 60 --batch-size 64 --learning-rate 1e-3 --threads 1 \\
        --mixed-precision --no-channels-last
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from diffusers import UNet2DModel
from torch import Tensor
from tqdm import tqdm
from training import BatchSource, add_training_options, run_training

RESOLUTION = 32
CHANNELS = 3
CHANNELS_BY_LEVEL = (32, 64, 128, 128)


def make_unet(channels: Sequence[int] = CHANNELS_BY_LEVEL) -> UNet2DModel:
    """Return the untrained network, with attention at 16x16 (about 6.1 million parameters).

    Levels, layers and attention as in the network of Ho et al. 2020 for CIFAR-10, with a sixth of its
    parameters. Few channels at 32x32, where they cost most, and one attention head: with 8 channels a head,
    the default, attention takes half of a training step on a CPU.

    channels: of each level, from 32x32 down, at least two of them, multiples of 16.
    """
    has_attention = [level == 1 for level in range(len(channels))]
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in has_attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(has_attention)),
        layers_per_block=2,
        attention_head_dim=None,
        norm_num_groups=16,
    )


def find_column(dataset: Dataset, names: Sequence[str]) -> str:
    """Return the first of these names that a column has.

    Raises:
        ValueError: there is none.
    """
    for name in names:
        if name in dataset.column_names:
            return name
    raise ValueError(f"the data have columns {dataset.column_names}; one must be named {' or '.join(names)}")


def of_class(dataset: Dataset, label: int) -> Dataset:
    """Return the rows with this label.

    Raises:
        ValueError: there are none.
    """
    labels = dataset[find_column(dataset, ("label", "labels"))]
    rows = [row for row, found in enumerate(labels) if found == label]
    if not rows:
        raise ValueError(f"no image has label {label}; the labels are {sorted(set(labels))}")
    return dataset.select(rows)


def load_images(files: list[Path], *, limit: int | None, label: int | None = None) -> Tensor:
    """Return the images of the parquet files, (N, 3, 32, 32) uint8, at most `limit` of them.

    label: keep the images with this label only.

    Raises:
        ValueError: an image is not 32x32, or none has the label.
    """
    dataset = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    if label is not None:
        dataset = of_class(dataset, label)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    images = np.empty((len(dataset), RESOLUTION, RESOLUTION, CHANNELS), dtype=np.uint8)
    column = dataset[find_column(dataset, ("image", "img"))]
    for index, image in enumerate(tqdm(column, desc="decode", unit="image", mininterval=5)):
        if image.size != (RESOLUTION, RESOLUTION):
            raise ValueError(f"image {index} is {image.size[0]}x{image.size[1]}; 32x32 is needed")
        images[index] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_signed(images: Tensor) -> Tensor:
    """Return 8-bit images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def make_batch_source(images: Tensor) -> BatchSource:
    """Return a function that draws images with replacement, half of them mirrored, in [-1, 1].

    images: (N, 3, 32, 32), uint8, on the device that trains.
    """

    def draw_batch(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        batch = to_signed(images[chosen.to(images.device)])
        return torch.where(mirrored.to(images.device)[:, None, None, None], batch.flip(-1), batch)

    return draw_batch


def main() -> None:
    """Train on CUDA when there is a device, else on the CPU, and write the folder."""
    parser = argparse.ArgumentParser(description="Train a CIFAR-10 model.")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="parquet files")
    parser.add_argument("--label", type=int, help="use only images of this class")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=CHANNELS_BY_LEVEL, help="channels of each level"
    )
    parser.add_argument("--limit", type=int, help="use only the first images")
    parser.add_argument("--held-out", type=Path, nargs="+", help="parquet files to evaluate the loss on")
    parser.add_argument("--held-out-images", type=int, default=1024, help="use the first so many of them")
    parser.add_argument("--evaluation-steps", type=int, default=300, help="steps between two evaluations")
    add_training_options(parser, steps=None, batch_size=256)
    parser.set_defaults(learning_rate=5e-4)
    options = parser.parse_args()
    if options.steps is None and options.minutes is None:
        options.minutes = 25.0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    images = load_images(options.data, limit=options.limit, label=options.label).to(device)
    data = {
        "name": "CIFAR-10",
        "source": "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        "files": [file.name for file in options.data],
        "images": len(images),
        "preparation": "8-bit RGB scaled to [-1, 1]",
        "augmentation": "horizontal flips",
    }
    held_out = None
    if options.label is not None:
        data["label"] = options.label
    if options.held_out:
        held_out = to_signed(
            load_images(options.held_out, limit=options.held_out_images, label=options.label)
        )
        data["held_out"] = {"files": [file.name for file in options.held_out], "images": len(held_out)}
    run_training(
        options,
        make_unet(options.channels),
        make_batch_source(images),
        data=data,
        device=device,
        packages=("torch", "diffusers", "datasets"),
        held_out=held_out,
        evaluation_steps=options.evaluation_steps,
    )


if __name__ == "__main__":
    main()
