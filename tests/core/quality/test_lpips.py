import sys

import pytest
import torch
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality.paired import Lpips


class Squares(nn.Module):
    """Mean squared difference, in the shape that torchmetrics' network returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen += [a, b]
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


def test_each_pair_gets_one_number_from_images_in_minus_one_to_one() -> None:
    network = Squares()
    black, white = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    mixed = torch.stack([black[0], white[0]])
    distances = Lpips(network=network)(mixed, black)
    assert distances.tolist() == [0.0, 4.0]
    assert distances.dtype == torch.float64
    assert (float(network.seen[0].min()), float(network.seen[0].max())) == (-1, 1)


def test_grey_is_repeated() -> None:
    network, grey = Squares(), torch.rand(2, 1, 4, 4)
    Lpips(network=network)(grey, grey)
    assert torch.equal(network.seen[0], 2 * grey.repeat(1, 3, 1, 1) - 1)


def test_the_name_says_which_network() -> None:
    assert Lpips(network=Squares()).name == "LPIPS (Squares)"


def test_what_does_not_fit_is_refused() -> None:
    lpips = Lpips(network=nn.Bilinear(2, 2, 1))
    with pytest.raises(ReportError, match=r"images have shape \(2, 2, 4, 4\); .* takes \(B, 1 or 3, H, W\)"):
        lpips(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="images have shape"):
        lpips(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ReportError, match=r"fails on images of shape \(2, 3, 4, 4\)"):
        lpips(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(
        ReportError, match=r"distances of shape \(2, 3, 4, 2\) for 2 pairs; .* one number a pair"
    ):
        Lpips(network=nn.Bilinear(4, 4, 2))(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ReportError, match=r"needs torchmetrics and torchvision .*pip install 'errata\[metrics\]'"
    ):
        Lpips()
