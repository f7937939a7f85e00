from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality import Reference, frechet_distance, statistics
from errata.quality.real_images import dataset_images


class Pixels(nn.Module):
    """Four block means of an image as its features."""

    name = "block-means"
    channels = 1
    dimension = 4

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).mean(dim=1).flatten(1)


def pictures(count: int = 7, size: int = 8) -> list[Image.Image]:
    codes = torch.randint(256, (count, size, size), dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in codes]


def features_of(images: list[Image.Image]) -> Tensor:
    return Pixels()(torch.stack([torch.from_numpy(np.array(image)) for image in images]).unsqueeze(1) / 255)


def dataset_of(images: list[Image.Image]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": images, "label": list(range(len(images)))}
    return datasets.Dataset.from_dict(rows, features=features)


def write(images: list[Image.Image], kind: str, folder: Path) -> str:
    if kind == "saved":
        dataset_of(images).save_to_disk(str(folder))
    elif kind == "saved dictionary":
        datasets.DatasetDict({"train": dataset_of(images)}).save_to_disk(str(folder))
    elif kind == "parquet":
        folder.mkdir()
        dataset_of(images).to_parquet(str(folder / "train-00000.parquet"))
    else:
        folder.mkdir()
        for index, image in enumerate(images):
            image.save(folder / f"{index:03}.png")
    return str(folder)


@pytest.mark.parametrize("kind", ["saved", "saved dictionary", "parquet", "images"])
def test_a_dataset_gives_the_statistics_of_its_images(tmp_path: Path, kind: str) -> None:
    images = pictures()
    reference = Reference.open(f"{write(images, kind, tmp_path / 'data')}:image", Pixels())
    expected = features_of(images)
    assert reference.statistics.count == 7
    assert frechet_distance(reference.statistics, statistics(expected)) <= 1e-9
    assert reference.real is not None
    torch.testing.assert_close(reference.real, expected)
    assert reference.image_size == (8, 8, 1)
    assert "data:image (train)" in reference.source


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    images = [*pictures(6), *pictures(1, size=9)]
    source = write(images, "parquet", tmp_path / "data")
    assert Reference.from_dataset(source, "image", Pixels(), limit=6).statistics.count == 6
    with pytest.raises(ReportError, match="data:image` is 9x9, .*data:image` is 8x8"):
        Reference.from_dataset(source, "image", Pixels())


def test_what_is_no_dataset_of_images_is_refused(tmp_path: Path) -> None:
    source = write(pictures(), "parquet", tmp_path / "data")
    with pytest.raises(ReportError, match="has no column `picture`; it has image, label"):
        Reference.from_dataset(source, "picture", Pixels())
    with pytest.raises(ReportError, match="data:label` holds a int, which is not an image"):
        Reference.from_dataset(source, "label", Pixels())
    with pytest.raises(ReportError, match="split `test`, cannot be read: .*allowed are a hub name"):
        Reference.from_dataset(source, "image", Pixels(), split="test")
    with pytest.raises(ReportError, match="there are 1 images of .*; at least 2 are needed"):
        Reference.from_dataset(source, "image", Pixels(), limit=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="empty`, split `train`, cannot be read"):
        Reference.from_dataset(str(tmp_path / "empty"), "image", Pixels())


def test_bytes_of_a_plain_parquet_file_are_decoded(tmp_path: Path) -> None:
    content = tmp_path / "a.png"
    pictures(1)[0].save(content)
    rows = {"image": [{"bytes": content.read_bytes()}, {"bytes": b"noise"}]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "data" / "train.parquet"))
    images = dataset_images(str(tmp_path / "data"), "image")
    assert next(images).pixels.size == (8, 8)
    with pytest.raises(ReportError, match="data:image` holds an image that cannot be read"):
        next(images)
