"""Train the feature network of the embedded digits, and store the statistics of the real images.

    pip install scikit-learn
    python examples/train_digit_features.py --out runs/digit_features

The network is tested on a fifth of the data that it never trained on. The statistics are of all
1797 images, unmoved and in [0, 1], as a perfect generator would return them.
"""

import argparse
import hashlib
import json
import logging
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange
from train_digits import MAXIMUM_ROTATION, MAXIMUM_SHIFT, enlarge, load_scans

from errata.directories import write_whole
from errata.embedded import CONFIG_FILE, REFERENCE_FILE, WEIGHTS_FILE, DigitFeatures
from errata.errors import ErrataError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2


def fit_(network: DigitFeatures, scans: Tensor, labels: Tensor, *, steps: int, batch_size: int) -> None:
    """Train `network` in place on moved images (rotation up to 6 degrees, shift up to 1 pixel).

    scans: (N, 1, 8, 8), float32 in [0, 1]. labels: (N,), int64.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    network.train()
    for _ in trange(steps, unit="step", mininterval=5):
        chosen = torch.randint(len(scans), (batch_size,))
        angles = (2 * torch.rand(batch_size) - 1) * MAXIMUM_ROTATION
        shifts = (2 * torch.rand(batch_size, 2) - 1) * MAXIMUM_SHIFT
        images = enlarge(scans[chosen], angles=angles, shifts=shifts)
        loss = F.cross_entropy(network.classify(images), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def measure_accuracy(network: DigitFeatures, images: Tensor, labels: Tensor) -> float:
    """Return the share of images, (B, 1, 16, 16), whose best class is the labelled one."""
    return float((network.classify(images).argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def measure_statistics(network: DigitFeatures, images: Tensor) -> dict[str, np.ndarray]:
    """Return mean, unbiased covariance and count of the features, in float64, and the features in float16."""
    features = network(images).double().numpy()
    return {
        "mu": features.mean(axis=0),
        "sigma": np.cov(features, rowvar=False),
        "count": np.asarray(len(features), dtype=np.int64),
        "features": features.astype(np.float16),
    }


def write_features(
    folder: Path, network: DigitFeatures, statistics: dict[str, np.ndarray], record: dict[str, object]
) -> None:
    """Write weights (safetensors), reference statistics (npz without pickles) and description (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save_tensors({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    config = {
        "name": network.name,
        "metric": "Fréchet distance in digit features",
        "dimension": network.dimension,
        "resolution": network.resolution,
        "channels": 1,
        "input_range": [0.0, 1.0],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_whole(folder / WEIGHTS_FILE, weights, error=ErrataError, advice="free some space")
    with (folder / REFERENCE_FILE).open("wb") as file:
        np.savez(file, allow_pickle=False, **statistics)
    text = json.dumps(config | record, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / CONFIG_FILE, text.encode(), error=ErrataError, advice="free some space")


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Train the feature network of the embedded digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dimension", type=int, default=64, help="number of features")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, test, measure the reference statistics and write the folder."""
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    scans, labels = load_scans()
    train_part, test_part = train_test_split(
        np.arange(len(scans)), test_size=TEST_SHARE, stratify=labels.numpy(), random_state=options.seed
    )
    network = DigitFeatures(options.dimension)
    fit_(network, scans[train_part], labels[train_part], steps=options.steps, batch_size=options.batch_size)
    images = enlarge(scans)
    accuracy = measure_accuracy(network, images[test_part], labels[test_part])
    logger.info("test accuracy %.4f on %d images", accuracy, len(test_part))
    record: dict[str, object] = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "test_accuracy": round(accuracy, 6),
        "test_images": len(test_part),
        "train_images": len(train_part),
        "reference_images": len(images),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "numpy")},
    }
    write_features(options.out, network, measure_statistics(network, images), record)


if __name__ == "__main__":
    main()
