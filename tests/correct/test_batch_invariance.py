"""Functions of a batch, made row by row."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from errata.correct.batch_invariance import row_by_row, run_row_by_row
from errata.errors import PlanError


@dataclass
class Output(BaseOutput):  # type: ignore[misc]
    sample: Tensor
    states: tuple[Tensor, ...] | None = None
    rest: Any = None


def test_every_row_is_alone() -> None:
    sizes: list[tuple[int, ...]] = []

    @row_by_row
    def function(x: Tensor, weight: Tensor, *, mask: Tensor, scale: float) -> Output:
        """What it does."""
        sizes.append((len(x), len(weight), len(mask)))
        y = scale * x * mask + weight.sum()
        return Output(sample=y, states=(y, 2 * y))

    x, weight, mask = torch.randn(3, 4), torch.randn(5), torch.tensor([[1.0], [0.0], [2.0]])
    found = function(x, weight, mask=mask, scale=3.0)
    assert sizes == [(1, 5, 1)] * 3
    assert isinstance(found, Output)
    expected = 3 * x * mask + weight.sum()
    assert torch.equal(found.sample, expected)
    assert found.states is not None
    assert torch.equal(found.states[1], 2 * expected)
    assert found["sample"] is found.sample
    assert function.__doc__ == "What it does."


def test_a_row_alone_goes_through_as_it_is() -> None:
    function = row_by_row(lambda x=None: Output(sample=x, rest=OrderedDict))
    x = torch.randn(1, 2)
    assert function(x).sample is x
    assert function().sample is None


def test_a_mean_over_the_batch_is_the_mean_of_the_rows() -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(row_by_row(lambda x: (x, x.square().mean()))(x)[1], x.square().mean())


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(
        PlanError, match="a part of the pipeline returned a list, which cannot be joined row by row"
    ):
        row_by_row(lambda x: [x])(torch.randn(2, 3))


def test_parts_are_changed_on_the_copy_alone() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def forward(self, ids: Tensor) -> tuple[Tensor]:
            self.sizes.append(len(ids))
            return (2 * ids,)

    class Pipe:
        def __init__(self, encoder: Encoder) -> None:
            self.text_encoder, self.text_encoder_2, self.vae = encoder, None, None

    encoder = Encoder()
    hooked: list[int] = []
    encoder.register_forward_hook(lambda module, args, output: hooked.append(len(output[0])))
    pipe = Pipe(encoder)
    run_row_by_row(pipe)
    assert pipe.text_encoder is not encoder
    ids = torch.arange(6).reshape(3, 2)
    assert torch.equal(pipe.text_encoder(ids)[0], 2 * ids)
    assert (encoder.sizes, hooked) == ([1, 1, 1], [3])
    assert "forward" not in vars(encoder)
    encoder(ids)
    assert encoder.sizes[-1] == 3
