"""What images are compared with: reference statistics and their feature network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from errata.embedded import load_features, reference_features, reference_statistics
from errata.errors import ReportError
from errata.quality.moments import FeatureStatistics, StatisticsAccumulator, read_statistics, write_statistics
from errata.quality.network import channels_of, device_of, dimension_of, network_name, weights_digest
from errata.quality.real_images import RealImage, dataset_images, folder_images, image_batches

__all__ = ["KEPT_FEATURES", "Reference", "network_name", "weights_digest"]

KEPT_FEATURES = 10_000
"""At most so many real images keep their features, for kernel distance, precision and recall."""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in the features of one network.

    Attributes:
        network: maps images (B, C, H, W), float32 in [0, 1], to features (B, D).
        statistics: of the real images in these features.
        source: where the statistics come from, for people.
        name: of the feature network; the metric is called "Fréchet distance in `name`".
        digest: SHA-256 of the network's weights; distances compare only where it is equal.
        real: features (M, D), float32, of all the real images, or of at most `KEPT_FEATURES` spread evenly
            over them; None where only statistics are known.
        image_size: (H, W, C) of the real images as the network saw them, if it did.
    """

    network: nn.Module
    statistics: FeatureStatistics
    source: str
    name: str
    digest: str = field(default="")
    real: Tensor | None = None
    image_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", weights_digest(self.network))

    @classmethod
    def embedded(cls) -> Reference:
        """Return the handwritten digits that the embedded model was trained on, in its features."""
        mean, covariance, count = reference_statistics()
        network = load_features()
        return cls(
            network,
            FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count),
            "the real digits that the embedded model was trained on",
            network.name,
            real=torch.from_numpy(reference_features()),
            image_size=(network.resolution, network.resolution, network.channels),
        )

    @classmethod
    def from_statistics(cls, path: Path, network: nn.Module, *, name: str | None = None) -> Reference:
        """Read an `.npz` of `mu` (D,), `sigma` (D, D), and optional `count` and `features` (M, D).

        Raises:
            ReportError: the file is missing, unreadable, lacks an array, or holds what cannot be a mean,
                a covariance, a count and features; or the network is known to give another D.
        """
        statistics, real = read_statistics(path)
        dimension = dimension_of(network)
        if dimension is not None and dimension != statistics.dimension:
            raise ReportError(
                f"statistics file `{path}` has dimension {statistics.dimension}, feature network "
                f"`{network_name(network)}` gives {dimension} features; pass the network that "
                "it was made with as `network`"
            )
        return cls(network, statistics, str(path), name or network_name(network), real=real)

    @classmethod
    def from_folder(cls, folder: Path, network: nn.Module, *, name: str | None = None) -> Reference:
        """Compute the statistics of all PNG and JPEG files under a folder, of one size; nothing is resized.

        Grey for a network whose `channels` is 1, RGB otherwise. Warns if they are too few for
        `rank_shortfall`.

        Raises:
            ReportError: no folder, fewer than two images, an unreadable one, or images of several sizes.
        """
        return cls._from_images(folder_images(folder), network, f"images under {folder}", name)

    @classmethod
    def from_dataset(
        cls,
        name_or_path: str,
        column: str,
        network: nn.Module,
        *,
        split: str = "train",
        limit: int | None = None,
        name: str | None = None,
    ) -> Reference:
        """Compute the statistics of an image column of a dataset: the first `limit` images, or all.

        Otherwise as `from_folder`.

        name_or_path: a hub name, a directory that `Dataset.save_to_disk` wrote, or one of parquet files or
        images.

        Raises:
            ReportError: the dataset or column cannot be read, or holds fewer than two images or several
            sizes.
        """
        images = dataset_images(name_or_path, column, split=split, limit=limit)
        return cls._from_images(images, network, f"images of {name_or_path}:{column} ({split})", name)

    @classmethod
    def _from_images(
        cls, images: Iterator[RealImage], network: nn.Module, source: str, name: str | None
    ) -> Reference:
        accumulator, kept, size = StatisticsAccumulator(), _EvenSample(KEPT_FEATURES), None
        for batch in image_batches(images, grey=channels_of(network) == 1):
            features = _features(network, batch, f"the {source}")
            accumulator.add(features)
            kept.add(features)
            size = (batch.shape[2], batch.shape[3], batch.shape[1])
        if kept.seen < 2:
            raise ReportError(f"there are {kept.seen} {source}; at least 2 are needed")
        reference = cls(
            network,
            accumulator.statistics(),
            f"{kept.seen} {source}",
            name or network_name(network),
            real=kept.features(),
            image_size=size,
        )
        if (shortfall := reference.rank_shortfall) is not None:
            warnings.warn(shortfall, stacklevel=3)
        return reference

    @classmethod
    def open(cls, source: str | Path, network: nn.Module | None = None) -> Reference:
        """Open `"embedded"`, an `.npz` file, a folder of images or `DATASET:COLUMN`.

        Without `network`, in the embedded features.

        Raises:
            ReportError: as `from_statistics`, `from_folder` and `from_dataset`, or `source` is none of these.
        """
        if str(source) == "embedded":
            return cls.embedded()
        path = Path(source)
        used = network if network is not None else load_features()
        if path.is_dir():
            return cls.from_folder(path, used)
        if path.suffix == ".npz":
            return cls.from_statistics(path, used)
        dataset, _, column = str(source).rpartition(":")
        if dataset and column:
            return cls.from_dataset(dataset, column, used)
        raise ReportError(
            f"reference `{source}` is not an image folder or .npz file; give one of these, DATASET:COLUMN, "
            'or "embedded"'
        )

    def save(self, path: Path, *, with_features: bool = False) -> None:
        """Write `mu`, `sigma` and `count` as the `.npz` that `from_statistics` and other tools read.

        with_features: also the real features, which the kernel distance and precision and recall need.

        Raises:
            ReportError: the features are asked for, and there are none.
        """
        if with_features and self.real is None:
            raise ReportError(
                f"the reference from {self.source} holds no real features to save; make it from the images"
            )
        write_statistics(path, self.statistics, self.real if with_features else None)

    @property
    def rank_shortfall(self) -> str | None:
        """What is wrong if there are no more images than features; None if there are more."""
        count, dimension = self.statistics.count, self.statistics.dimension
        if not 0 < count <= dimension:
            return None
        return (
            f"reference: {count} images for the {dimension} features of `{self.name}`, so the "
            f"covariance lacks rank and distances are too large; use at least {dimension + 1} images, "
            "preferably ten times as many"
        )

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, D), float64 on the CPU, of images (B, C, H, W), float32 in [0, 1].

        Raises:
            ReportError: the network refuses the images, or its features do not match the statistics.
        """
        features = _features(self.network, images, "images")
        if features.ndim != 2 or features.shape[1] != self.statistics.dimension:
            raise ReportError(
                f"feature network `{self.name}` gives features of shape {tuple(features.shape)}, but the "
                f"statistics from {self.source} have dimension {self.statistics.dimension}; "
                "pass the network that they were made with as `network`"
            )
        return features.to("cpu", torch.float64)


class _EvenSample:
    """At most `most` rows of a stream of unknown length: every 2^k-th, k growing as it must."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._step = 1
        self._rows: list[Tensor] = []
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        first = -self.seen % self._step
        # Copies: a view would keep its whole batch alive.
        self._rows += [row.clone() for row in rows[first :: self._step].to("cpu", torch.float32)]
        self.seen += len(rows)
        while len(self._rows) > self._most:
            self._rows, self._step = self._rows[::2], 2 * self._step

    def features(self) -> Tensor:
        return torch.stack(self._rows)


@torch.inference_mode()
def _features(network: nn.Module, images: Tensor, what: str) -> Tensor:
    try:
        return network(images.to(device_of(network)))
    except (RuntimeError, ValueError, ReportError) as problem:
        raise ReportError(
            f"feature network `{network_name(network)}` fails on {what}, of shape {tuple(images.shape)}: "
            f"{problem}"
        ) from problem
