"""The map of predictions against the sum written out, and a denoiser behind it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from errata.correct.sheets.fitted_maps import MappedDenoiser
from errata.runtime.output_map import CallMaps, OutputMap
from errata.runtime.schedule import CacheSchedule

PREDICTION = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def maps_of(seed: int, calls: int = 3, channels: int = 3) -> CallMaps:
    generator = torch.Generator().manual_seed(seed)
    return CallMaps(
        matrix=torch.randn(calls, channels, channels, generator=generator),
        bias=torch.randn(calls, channels, generator=generator),
    )


@pytest.mark.parametrize("kind", ["full", "cached"])
def test_every_pixel_is_mapped_with_the_numbers_of_its_call(kind: Any) -> None:
    maps = {"full": maps_of(1), "cached": maps_of(2)}
    found = OutputMap(**maps)(PREDICTION, 1, kind)
    expected = torch.einsum("ij,bjhw->bihw", maps[kind].matrix[1], PREDICTION)
    expected = expected + maps[kind].bias[1][:, None, None]
    assert torch.allclose(found, expected, atol=1e-5)
    for wrong in (OutputMap(**maps)(PREDICTION, 2, kind), expected.transpose(0, 1)[:2], PREDICTION):
        assert wrong.shape != found.shape or float((wrong - found).abs().max()) > 1e-3


def test_the_identity_returns_the_prediction_itself() -> None:
    maps = CallMaps.identity(2, 3)
    maps.bias[1, 0] = 1e-6
    output_map = OutputMap(full=maps)
    assert output_map(PREDICTION, 0, "full") is PREDICTION
    assert output_map(PREDICTION, 1, "full") is not PREDICTION


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays_and_the_sum_is_made_in_float32_or_wider(dtype: torch.dtype) -> None:
    output_map = OutputMap(full=maps_of(1))
    narrow = PREDICTION.to(dtype)
    found = output_map(narrow, 0, "full")
    assert found.dtype is dtype
    if dtype is not torch.float64:
        assert torch.equal(found, output_map(narrow.float(), 0, "full").to(dtype))


@pytest.mark.parametrize(
    ("matrix", "bias"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(3, 3)),
        (torch.zeros(2, 3, 2), torch.zeros(2, 3)),
        (torch.zeros(2, 3, 3), torch.full((2, 3), torch.nan)),
        (torch.full((2, 3, 3), torch.inf), torch.zeros(2, 3)),
    ],
)
def test_numbers_that_do_not_belong_together_are_refused(matrix: Tensor, bias: Tensor) -> None:
    with pytest.raises(ValueError, match="belong together|not finite"):
        CallMaps(matrix=matrix, bias=bias)


class Plain:
    """A denoiser whose prediction is its input, doubled by a cached call."""

    reuses_outputs = True
    schedule = CacheSchedule(num_steps=3, full_steps=(0,), branch=1)
    timesteps = (3.0, 2.0, 1.0)

    def full(self, x: Tensor, step: int, cond: object) -> tuple[Tensor, Tensor]:
        return x, x[:, :1]

    def cached(
        self, x: Tensor, step: int, cond: object, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        return 2 * x if is_extrapolated else 2 * x + feature

    def cost(self, kind: str, *, batch_size: int | None = None) -> float:
        return {"full": 3.0, "cached": 1.0}[kind] * (batch_size or 1)


def test_a_mapped_denoiser_maps_predictions_and_nothing_else() -> None:
    plain = Plain()
    output_map = OutputMap(full=maps_of(1), cached=maps_of(2))
    mapped = MappedDenoiser(plain, output_map)  # type: ignore[arg-type]
    prediction, feature = mapped.full(PREDICTION, 1, {})
    assert feature is not None
    assert torch.equal(feature, PREDICTION[:, :1])
    assert torch.equal(prediction, output_map(PREDICTION, 1, "full"))
    plain_cached = plain.cached(PREDICTION, 2, {}, feature)
    assert torch.equal(mapped.cached(PREDICTION, 2, {}, feature), output_map(plain_cached, 2, "cached"))
    assert mapped.cost("full", batch_size=2) == 6.0
    assert (mapped.schedule, mapped.timesteps) == (plain.schedule, plain.timesteps)
    assert mapped.reuses_outputs
