from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from errata.embedded import load_features
from errata.errors import ReportError
from errata.quality import Reference, frechet_distance, statistics
from errata.quality import reference as reference_module
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
        ({"mu": np.zeros(4)}, "has no sigma; it holds"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"mu has shape \(4,\), sigma \(5, 5\)"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "not finite real numbers"),
        ({"mu": np.array(["a"] * 4), "sigma": np.eye(4)}, "not finite real numbers"),
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
    with pytest.raises(ReportError, match="is not an image folder or .npz file"):
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
    with pytest.raises(ReportError, match="digit-features.*fails on the images.*16x16"):
        Reference.open(tmp_path)


def test_features_must_match_the_statistics() -> None:
    reference = Reference(Pixels(), statistics(torch.randn(20, 5)), "somewhere", "block-means")
    with pytest.raises(ReportError, match=r"features of shape \(2, 4\).*from somewhere have dimension 5"):
        reference.features(torch.zeros(2, 1, 8, 8))


def test_the_embedded_reference_fits_its_network() -> None:
    reference = Reference.open("embedded")
    assert reference.statistics.count == 1797
    assert reference.features(torch.rand(3, 1, 16, 16)).shape == (3, reference.statistics.dimension)


def test_a_folder_keeps_its_features_and_size(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 9)
    reference = Reference.from_folder(tmp_path / "images", Pixels())
    assert reference.image_size == (8, 8, 1)
    assert reference.real is not None
    torch.testing.assert_close(reference.real, Pixels()(images))


def test_of_many_images_an_even_choice_keeps_its_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "KEPT_FEATURES", 30)
    images = write_images(tmp_path / "images", 150)
    reference = Reference.from_folder(tmp_path / "images", Pixels())
    assert reference.statistics.count == 150
    assert reference.real is not None
    torch.testing.assert_close(reference.real, Pixels()(images)[::8])


def test_real_features_are_saved_only_when_asked(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 9)
    reference = Reference.from_folder(tmp_path / "images", Pixels())
    reference.save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as stored:
        assert set(stored.files) == {"mu", "sigma", "count"}
    plain = Reference.open(tmp_path / "plain.npz", Pixels())
    assert plain.real is None
    assert plain.image_size is None
    reference.save(tmp_path / "whole.npz", with_features=True)
    again = Reference.open(tmp_path / "whole.npz", Pixels()).real
    assert again is not None
    assert reference.real is not None
    assert torch.equal(again, reference.real)
    with pytest.raises(
        ReportError, match="plain.npz holds no real features to save; make it from the images"
    ):
        plain.save(tmp_path / "more.npz", with_features=True)


@pytest.mark.parametrize("features", [np.zeros((3, 5)), np.zeros((0, 4)), np.full((3, 4), np.inf)])
def test_features_that_do_not_fit_are_refused(tmp_path: Path, features: np.ndarray) -> None:
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=np.eye(4), features=features)
    with pytest.raises(ReportError, match=r"features have shape .* expected finite numbers \(M, 4\)"):
        Reference.open(tmp_path / "bad.npz", Pixels())


def test_too_few_images_for_a_covariance_are_worth_a_warning(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    with pytest.warns(UserWarning, match="4 images for the 4 features of `block-means`.* at least 5 images"):
        reference = Reference.from_folder(tmp_path / "images", Pixels())
    assert reference.rank_shortfall is not None
    write_images(tmp_path / "more", 5)
    assert Reference.from_folder(tmp_path / "more", Pixels()).rank_shortfall is None


def test_statistics_of_another_network_are_refused_when_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "inception.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ReportError, match="has dimension 5, feature network `digit-features` gives 64"):
        Reference.open(tmp_path / "inception.npz")
    known = Pixels()
    known.resolution = 8  # type: ignore[assignment]
    with pytest.raises(ReportError, match="has dimension 5, feature network `block-means` gives 4 features"):
        Reference.open(tmp_path / "inception.npz", known)
    assert Reference.open(tmp_path / "inception.npz", Pixels()).statistics.dimension == 5


def test_the_embedded_real_features_have_the_embedded_statistics() -> None:
    reference = Reference.embedded()
    assert reference.real is not None
    assert reference.real.shape == (1797, 64)
    assert reference.image_size == (16, 16, 1)
    own, stored = statistics(reference.real), reference.statistics
    # float16 has 11 bits, and features reach 6.
    torch.testing.assert_close(own.mean, stored.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(own.covariance, stored.covariance, rtol=0, atol=1e-3)
    assert frechet_distance(own, stored) <= 1e-6
    assert frechet_distance(statistics(reference.real[::2]), stored) > 1e-3


def test_the_embedded_network_classifies_its_features() -> None:
    network, images = load_features(), torch.rand(3, 1, 16, 16)
    assert torch.equal(network.logits(network(images)), network.classify(images))
    real = Reference.embedded().real
    assert real is not None
    assert network.logits(real.double()).argmax(dim=1).bincount(minlength=10).min() > 150
