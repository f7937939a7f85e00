import pytest
import torch

from errata.compress.cache.cache_correction import ChannelFit


def test_an_affine_target_gives_back_its_gain_and_shift() -> None:
    gain, shift = torch.tensor([2.0, -0.5, 1.0]), torch.tensor([0.1, 30.0, 0.0])
    fit = ChannelFit(4, 3)
    for seed in range(5):
        source = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) + 10
        fit.add(2, source, source * gain[:, None, None] + shift[:, None, None])
    gains, shifts = fit.solve()
    assert gains.shape == shifts.shape == (4, 3)
    assert gains.dtype == shifts.dtype == torch.float32
    torch.testing.assert_close(gains[2], gain, rtol=0, atol=1e-6)
    torch.testing.assert_close(shifts[2], shift, rtol=0, atol=1e-5)


def test_it_is_the_least_squares_line_of_all_pairs() -> None:
    source, target = torch.randn(6, 3, 5, 5), torch.randn(6, 3, 5, 5)
    fit = ChannelFit(1, 3)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        fit.add(0, source[rows], target[rows])
    gain, shift = fit.solve()
    for channel in range(3):
        x = source[:, channel].flatten().double()
        design = torch.stack([x, torch.ones_like(x)], dim=1)
        line = torch.linalg.lstsq(design, target[:, channel].flatten().double()[:, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([gain[0, channel], shift[0, channel]]), line.float())


def test_channels_may_be_the_last_dimension() -> None:
    source = torch.randn(2, 7, 3)
    fit = ChannelFit(1, 3)
    fit.add(0, source, source * 3 - 1, channel_dim=-1)
    gain, shift = fit.solve()
    torch.testing.assert_close(gain[0], torch.full((3,), 3.0))
    torch.testing.assert_close(shift[0], torch.full((3,), -1.0))


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, -7e4])
def test_a_channel_that_does_not_vary_is_shifted_by_the_difference_of_the_means(value: float) -> None:
    source, target = torch.full((4, 1, 9, 9), value), torch.randn(4, 1, 9, 9)
    fit = ChannelFit(1, 1)
    fit.add(0, source, target)
    gain, shift = fit.solve()
    assert gain.item() == 1.0
    assert shift.item() == pytest.approx(target.mean().item() - value, rel=1e-5)


def test_a_step_without_pairs_is_left_as_it_is() -> None:
    fit = ChannelFit(3, 2)
    fit.add(1, torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    gain, shift = fit.solve()
    for step in (0, 2):
        assert gain[step].tolist() == [1.0, 1.0]
        assert shift[step].tolist() == [0.0, 0.0]


def test_a_gain_of_the_spread_gives_the_source_the_mean_and_deviation_of_the_target() -> None:
    source = torch.randn(6, 3, 5, 5)
    target = 0.7 * source + torch.randn(6, 3, 5, 5) - 1
    fit = ChannelFit(1, 3)
    fit.add(0, source, target)
    gain, shift = fit.solve("spread")
    corrected = gain[0, :, None, None] * source + shift[0, :, None, None]
    for value, wanted in zip(corrected.unbind(1), target.unbind(1), strict=True):
        torch.testing.assert_close(value.mean(), wanted.mean(), rtol=0, atol=1e-4)
        torch.testing.assert_close(value.std(), wanted.std(), rtol=1e-4, atol=0)
    assert (gain > 1.2 * fit.solve()[0]).all()  # least squares shrinks


def test_both_gains_agree_on_an_affine_target() -> None:
    source = torch.randn(6, 3, 5, 5)
    fit = ChannelFit(1, 3)
    fit.add(0, source, 1.5 * source + 7)
    for one, other in zip(fit.solve("spread"), fit.solve("least_squares"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_channel_that_hardly_varies_is_not_blown_up() -> None:
    fit = ChannelFit(1, 1)
    fit.add(0, 1e-3 * torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))
    assert fit.solve("spread")[0].item() == 4.0
