"""What images are compared with: reference statistics, and the feature network that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from errata.embedded import load_features, reference_statistics
from errata.errors import ReportError
from errata.quality.frechet import FeatureStatistics, StatisticsAccumulator

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_BATCH_SIZE = 64
# Rounding of a float32 covariance stays below this part of its largest value.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in the features of one network.

    Attributes:
        network: maps images (B, C, H, W), float32 in [0, 1], to features (B, D).
        statistics: of the real images in these features.
        source: where the statistics come from, for people.
        name: of the feature network; the metric is called "Fréchet distance in `name`".
        digest: SHA-256 of the network's weights; distances compare only where it is equal.
    """

    network: nn.Module
    statistics: FeatureStatistics
    source: str
    name: str
    digest: str = field(default="")

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", weights_digest(self.network))

    @classmethod
    def embedded(cls) -> Reference:
        """The handwritten digits that the embedded model was trained on, in its own feature network."""
        mean, covariance, count = reference_statistics()
        statistics = FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count)
        network = load_features()
        return cls(
            network, statistics, "the real digits that the embedded model was trained on", network.name
        )

    @classmethod
    def from_statistics(cls, path: Path, network: nn.Module, *, name: str | None = None) -> Reference:
        """Statistics from an `.npz` with `mu` (D,) and `sigma` (D, D), and `count` if it is there.

        Raises:
            ReportError: the file is missing, unreadable, lacks an array, or holds what cannot be a mean,
                a covariance and a count.
        """
        return cls(network, _read_statistics(path), str(path), name or network_name(network))

    @classmethod
    def from_folder(cls, folder: Path, network: nn.Module, *, name: str | None = None) -> Reference:
        """Statistics of all PNG and JPEG files under a folder; they must be of one size, and are not resized.

        Grey for a network whose `channels` is 1, RGB otherwise.

        Raises:
            ReportError: no folder, fewer than two images, an unreadable one, or images of several sizes.
        """
        grey = _channels(network) == 1
        accumulator = StatisticsAccumulator()
        paths = _image_files(folder)
        for batch in _image_batches(paths, grey=grey):
            accumulator.add(_features_of_folder(network, batch, folder))
        source = f"{len(paths)} images under {folder}"
        return cls(network, accumulator.statistics(), source, name or network_name(network))

    @classmethod
    def open(cls, source: str | Path, network: nn.Module | None = None) -> Reference:
        """`"embedded"`, an `.npz` file, or a folder of images; without `network`, in the embedded features.

        Raises:
            ReportError: as `from_statistics` and `from_folder`, or `source` is neither.
        """
        if str(source) == "embedded":
            return cls.embedded()
        path = Path(source)
        used = network if network is not None else load_features()
        if path.is_dir():
            return cls.from_folder(path, used)
        if path.suffix == ".npz":
            return cls.from_statistics(path, used)
        raise ReportError(
            f'reference `{source}` is no image folder and no .npz file; give one of them, or "embedded"'
        )

    def save(self, path: Path) -> None:
        """Write `mu`, `sigma` and `count` as the `.npz` that `from_statistics` reads."""
        statistics = self.statistics
        np.savez(
            path,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            count=np.asarray(statistics.count, dtype=np.int64),
        )

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, D), float64 on the CPU, of images (B, C, H, W), float32 in [0, 1].

        Raises:
            ReportError: the network refuses the images, or its features do not match the statistics.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        try:
            features = self.network(images.to(device))
        except (RuntimeError, ValueError, ReportError) as problem:
            raise ReportError(
                f"feature network `{self.name}` refuses images of shape {tuple(images.shape)}: {problem}"
            ) from problem
        if features.ndim != 2 or features.shape[1] != self.statistics.dimension:
            raise ReportError(
                f"feature network `{self.name}` gives features of shape {tuple(features.shape)}, but the "
                f"statistics from {self.source} have dimension {self.statistics.dimension}; "
                "use the network that they were made with"
            )
        return features.to("cpu", torch.float64)


def network_name(network: nn.Module) -> str:
    """The network's own `name`, else its class."""
    name = getattr(network, "name", None)
    return name if isinstance(name, str) else type(network).__name__


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of all parameters and buffers, in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_statistics(path: Path) -> FeatureStatistics:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: dict[str, Any] = {name: stored[name] for name in stored.files}
    except FileNotFoundError as problem:
        raise ReportError(f"statistics file `{path}` does not exist") from problem
    except Exception as problem:  # a hostile zip raises nearly anything
        raise ReportError(f"statistics file `{path}` cannot be read as .npz: {problem}") from problem
    missing = {"mu", "sigma"} - arrays.keys()
    if missing:
        raise ReportError(
            f"statistics file `{path}` lacks {', '.join(sorted(missing))}; it holds {sorted(arrays)}, "
            "and needs mu (D,) and sigma (D, D)"
        )
    mean, covariance = np.asarray(arrays["mu"]), np.asarray(arrays["sigma"])
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ReportError(
            f"statistics file `{path}`: mu has shape {mean.shape}, sigma {covariance.shape}; "
            "expected (D,) and (D, D)"
        )
    numeric = all(array.dtype.kind in "fiu" for array in (mean, covariance))
    if not (numeric and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ReportError(f"statistics file `{path}` holds values that are no finite real numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    _check_covariance(path, covariance)
    return FeatureStatistics(
        torch.from_numpy(mean), torch.from_numpy(covariance), _count(path, arrays.get("count"))
    )


def _count(path: Path, stored: np.ndarray | None) -> int:
    if stored is None:
        return 0
    if stored.ndim != 0 or stored.dtype.kind not in "iu" or stored < 0:
        raise ReportError(
            f"statistics file `{path}`: count has shape {stored.shape} and type {stored.dtype}; expected "
            "one integer, 0 or more; store np.asarray(number of images), or leave it out"
        )
    return int(stored)


def _check_covariance(path: Path, covariance: np.ndarray) -> None:
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _TOLERANCE * largest:
        raise ReportError(
            f"statistics file `{path}`: sigma is not symmetric; store the covariance, np.cov(features.T)"
        )
    eigenvalues = np.linalg.eigvalsh(covariance)
    if eigenvalues[0] < -_TOLERANCE * np.abs(eigenvalues).max():
        raise ReportError(
            f"statistics file `{path}`: sigma has the negative eigenvalue {eigenvalues[0]:.3g} (the largest "
            f"is {eigenvalues[-1]:.3g}), so it is no covariance; store np.cov(features.T)"
        )


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ReportError(f"image folder `{folder}` does not exist")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise ReportError(
            f"image folder `{folder}` holds {len(paths)} PNG or JPEG files; at least 2 are needed"
        )
    return paths


def _image_batches(paths: list[Path], *, grey: bool) -> Iterator[Tensor]:
    waiting = iter(paths)
    size: tuple[int, int] | None = None
    while chunk := list(islice(waiting, _BATCH_SIZE)):
        images = []
        for path in chunk:
            image = _read_image(path, grey=grey)
            size = size or (image.shape[1], image.shape[2])
            if tuple(image.shape[1:]) != size:
                raise ReportError(
                    f"image `{path}` is {image.shape[2]}x{image.shape[1]}, `{paths[0]}` is "
                    f"{size[1]}x{size[0]}; a reference needs images of one size"
                )
            images.append(image)
        yield torch.stack(images)


def _read_image(path: Path, *, grey: bool) -> Tensor:
    """(C, H, W), float32 in [0, 1]."""
    try:
        with Image.open(path) as opened:
            pixels = np.array(opened.convert("L" if grey else "RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as problem:
        raise ReportError(f"image `{path}` cannot be read: {problem}") from problem
    tensor = torch.from_numpy(pixels / 255)
    return tensor.unsqueeze(0) if grey else tensor.permute(2, 0, 1).contiguous()


@torch.inference_mode()
def _features_of_folder(network: nn.Module, images: Tensor, folder: Path) -> Tensor:
    try:
        return network(images)
    except (RuntimeError, ValueError, ReportError) as problem:
        raise ReportError(
            f"feature network `{network_name(network)}` refuses the images under `{folder}`, of shape "
            f"{tuple(images.shape[1:])}: {problem}"
        ) from problem


def _channels(network: nn.Module) -> int | None:
    channels = getattr(network, "channels", None)
    if isinstance(channels, int):
        return channels
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None else None
