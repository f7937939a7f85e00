import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import ReportError
from errata.quality import psnr
from errata.quality.intervals import centred_interval, mean_estimate
from errata.quality.paired import ssim, ssim_window


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 1, 4, 4)
    moved = images.clone()
    moved[0] += 0.1
    moved[1, 0, 0, 0] = 0.4  # mean square 0.16 / 16 = 0.01
    torch.testing.assert_close(psnr(moved, images), torch.tensor([20.0, 20.0]).double(), rtol=1e-6, atol=0)


def test_equal_images_have_a_finite_psnr() -> None:
    images = torch.rand(3, 3, 4, 4)
    assert psnr(images, images).tolist() == pytest.approx([100.0] * 3)


def test_psnr_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="images have shape"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4))


def test_mean_estimate_of_known_values() -> None:
    estimate = mean_estimate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert estimate.value == 2.5
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx((2.5 - half, 2.5 + half))
    with pytest.raises(ValueError, match="at least 2"):
        mean_estimate(torch.tensor([1.0]))


def test_centred_interval_keeps_the_scatter_and_drops_the_bias() -> None:
    resampled = torch.linspace(10, 12, 2001)
    interval = centred_interval(resampled, 5.0)
    assert (interval.low, interval.high) == pytest.approx((4.05, 5.95), abs=1e-3)


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(ssim(images, images), torch.ones(3).double())
    scores = [ssim((images + size * torch.randn_like(images)).clamp(0, 1), images) for size in (0.05, 0.2)]
    assert bool((scores[0] > scores[1]).all())
    assert scores[0].dtype == torch.float64


def test_ssim_is_a_gaussian_mean_of_local_statistics() -> None:
    images, reference = torch.rand(2, 2, 1, 12, 13, dtype=torch.float64)
    offsets = torch.arange(11).double() - 5
    weights = (-offsets.square() / (2 * 1.5**2)).exp()
    window = torch.outer(weights, weights) / weights.sum() ** 2

    def similarity(x: Tensor, y: Tensor) -> float:
        mean_x, mean_y = float((window * x).sum()), float((window * y).sum())
        var_x, var_y = float((window * x**2).sum()) - mean_x**2, float((window * y**2).sum()) - mean_y**2
        covariance = float((window * x * y).sum()) - mean_x * mean_y
        light = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        return light * (2 * covariance + 9e-4) / (var_x + var_y + 9e-4)

    padded = [functional.pad(batch, (5, 5, 5, 5), mode="reflect") for batch in (images, reference)]
    for x, y, score in zip(*padded, ssim(images, reference), strict=True):
        places = [
            similarity(x[0, i : i + 11, j : j + 11], y[0, i : i + 11, j : j + 11])
            for i in range(12)
            for j in range(13)
        ]
        assert float(score) == pytest.approx(sum(places) / (12 * 13), rel=1e-9)


@pytest.mark.parametrize(("side", "window"), [(3, 3), (4, 3), (8, 7), (10, 9), (11, 11), (64, 11)])
def test_a_small_image_gets_a_window_that_fits(side: int, window: int) -> None:
    assert ssim_window(side) == window
    images = torch.rand(2, 1, side, 64)
    torch.testing.assert_close(ssim(images, images), torch.ones(2).double())
    other = ssim(1 - images, images)
    assert bool((other < 0.5).all())
    whole = ssim(torch.cat([images, 1 - images]), torch.cat([images, images]))
    torch.testing.assert_close(whole, torch.cat([torch.ones(2).double(), other]))


def test_ssim_refuses_what_has_no_window() -> None:
    with pytest.raises(ReportError, match="images have a side of 2 pixels; SSIM needs at least 3"):
        ssim(torch.zeros(2, 1, 8, 2), torch.zeros(2, 1, 8, 2))
    with pytest.raises(ValueError, match="images have shape"):
        ssim(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_ssim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ReportError, match=r"SSIM needs torchmetrics .*pip install 'errata\[report\]'"):
        ssim(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
