import math

import pytest
import torch

from errata.quality import psnr
from errata.quality.intervals import centred_interval, mean_estimate


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
