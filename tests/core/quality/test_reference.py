from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality import Reference, frechet_distance, statistics
from errata.quality.reference import weights_digest


class Pixels(nn.Module):
    """Four block means of an image as its features."""

    name = "block-means"
    channels = 1

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).mean(dim=1).flatten(1)


def write_images(folder: Path, count: int, size: int = 8) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    codes = torch.randint(256, (count, 1, size, size), dtype=torch.uint8)
    for index, image in enumerate(codes):
        suffix = ".PNG" if index % 2 else ".png"
        Image.fromarray(image[0].numpy()).save(folder / f"{index:03}{suffix}", format="PNG")
    return codes.float() / 255


def test_a_folder_gives_the_statistics_of_its_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images" / "below", 70)
    reference = Reference.from_folder(tmp_path / "images", Pixels())
    expected = statistics(Pixels()(images))
    assert reference.statistics.count == 70
    assert frechet_distance(reference.statistics, expected) <= 1e-6
    torch.testing.assert_close(reference.statistics.mean, expected.mean, rtol=1e-6, atol=0)
    assert reference.name == "block-means"


def test_colour_is_read_for_a_network_that_takes_it(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    write_images(tmp_path / "images", 5)
    assert Reference.from_folder(tmp_path / "images", network).statistics.dimension == 2


def test_saved_statistics_are_read_back(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 9)
    reference = Reference.from_folder(tmp_path / "images", Pixels())
    reference.save(tmp_path / "statistics.npz")
    again = Reference.open(tmp_path / "statistics.npz", Pixels())
    assert torch.equal(again.statistics.mean, reference.statistics.mean)
    assert torch.equal(again.statistics.covariance, reference.statistics.covariance)
    assert again.statistics.count == 9
    assert again.digest == reference.digest


def test_statistics_without_a_count_are_welcome(tmp_path: Path) -> None:
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert Reference.from_statistics(tmp_path / "fid.npz", Pixels()).statistics.count == 0


def test_a_rounded_covariance_of_low_rank_is_welcome(tmp_path: Path) -> None:
    sigma = np.cov(np.random.default_rng(0).normal(size=(3, 9)), rowvar=False).astype(np.float32)
    np.savez(tmp_path / "few.npz", mu=np.zeros(9), sigma=sigma, count=np.asarray(3))
    assert Reference.from_statistics(tmp_path / "few.npz", Pixels()).statistics.count == 3


def test_digest_follows_the_weights() -> None:
    network = nn.Linear(2, 2)
    before = weights_digest(network)
    assert before == weights_digest(network)
    with torch.no_grad():
        network.weight[0, 0] += 1
    assert weights_digest(network) != before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, "lacks sigma; it holds"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"mu has shape \(4,\), sigma \(5, 5\)"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "no finite real numbers"),
        ({"mu": np.array(["a"] * 4), "sigma": np.eye(4)}, "no finite real numbers"),
        ({"mu": np.array([None] * 4), "sigma": np.eye(4)}, "cannot be read as .npz"),
        ({"mu": np.zeros(0), "sigma": np.eye(0)}, "mu has shape"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.ones(2, int)}, r"count has shape \(2,\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array(2.5)}, "count .* one integer, 0 or more"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array(-1)}, "count .* one integer, 0 or more"),
        ({"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
        ({"mu": np.zeros(4), "sigma": np.diag([1.0, 1, 1, -1e-3])}, "negative eigenvalue -0.001"),
    ],
    ids=[
        "missing",
        "shapes",
        "nan",
        "text",
        "pickle",
        "empty",
        "counts",
        "fraction",
        "negative-count",
        "asymmetric",
        "negative-eigenvalue",
    ],
)
def test_a_bad_statistics_file_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", allow_pickle=True, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ReportError, match=message):
        Reference.from_statistics(tmp_path / "bad.npz", Pixels())


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="missing.npz` does not exist"):
        Reference.open(tmp_path / "missing.npz", Pixels())
    (tmp_path / "noise.npz").write_bytes(b"noise")
    with pytest.raises(ReportError, match="cannot be read as .npz"):
        Reference.open(tmp_path / "noise.npz", Pixels())
    with pytest.raises(ReportError, match="is no image folder and no .npz file"):
        Reference.open("cifar10", Pixels())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="holds 0 PNG or JPEG files; at least 2 are needed"):
        Reference.open(tmp_path / "empty", Pixels())
    with pytest.raises(ReportError, match="does not exist"):
        Reference.from_folder(tmp_path / "nowhere", Pixels())


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    Image.new("L", (9, 8)).save(tmp_path / "999.png")
    with pytest.raises(ReportError, match="999.png` is 9x8, `.*000.png` is 8x8"):
        Reference.from_folder(tmp_path, Pixels())


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ReportError, match="broken.jpg` cannot be read"):
        Reference.from_folder(tmp_path, Pixels())


def test_images_that_the_network_refuses_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, 3, size=8)
    with pytest.raises(ReportError, match="digit-features.*refuses the images.*16x16"):
        Reference.open(tmp_path)


def test_features_must_match_the_statistics() -> None:
    reference = Reference(Pixels(), statistics(torch.randn(20, 5)), "somewhere", "block-means")
    with pytest.raises(ReportError, match=r"features of shape \(2, 4\).*from somewhere have dimension 5"):
        reference.features(torch.zeros(2, 1, 8, 8))


def test_the_embedded_reference_fits_its_network() -> None:
    reference = Reference.open("embedded")
    assert reference.statistics.count == 1797
    assert reference.features(torch.rand(3, 1, 16, 16)).shape == (3, reference.statistics.dimension)
