import pytest
import torch

from errata.quality.intervals import Measured
from errata.report.assemble import fronts


def at(value: float, noise: torch.Tensor) -> Measured:
    return Measured(value, replicates=value + noise)


def test_places_of_points() -> None:
    shared = torch.randn(500).double()
    own = torch.randn(500).double()
    points = {
        "cheap": (1.0, at(9, shared)),
        "good": (2.0, at(5, shared)),
        "no better than good": (2.5, at(5.01, own)),
        "worse than good": (2.5, at(6, shared + 0.01 * own)),
        "best": (4.0, at(4, shared)),
        "same as best": (4.0, at(4, own)),
    }
    assert fronts(points) == {
        "cheap": "on",
        "good": "on",
        "no better than good": "near",
        "worse than good": "off",
        "best": "on",
        "same as best": "on",
    }


@pytest.mark.parametrize("compute", [1.0, 0.5])
def test_one_point_is_a_front(compute: float) -> None:
    assert fronts({"only": (compute, at(3, torch.randn(10)))}) == {"only": "on"}
