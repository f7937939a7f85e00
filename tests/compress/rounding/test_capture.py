from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.compress.quantize.partial_forward import call_order, input_of, output_of
from errata.compress.rounding.blocks import Block
from errata.compress.rounding.capture import BlockData, capture_block
from errata.compress.rounding.row_store import RowStore
from errata.runtime.step_context import StepContext


class Doubling(nn.Module):
    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, offset: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append(self.name)
        return self.factor * x + (0 if offset is None else offset)


class Chain(nn.Module):
    def __init__(self, calls: list[str], options: Any = 5) -> None:
        super().__init__()
        self.last, self.middle, self.first = (Doubling(name, calls) for name in ("last", "middle", "first"))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x), offset=x[:, :1], options=self.options))
        return y


def test_a_pass_ends_at_the_block() -> None:
    calls: list[str] = []
    chain, x = Chain(calls), torch.randn(3, 4)
    args, kwargs = input_of(chain.middle, lambda: chain(x))
    assert calls == ["first"]
    assert torch.equal(args[0], 2 * x)
    assert torch.equal(kwargs["offset"], x[:, :1])
    calls.clear()
    assert torch.equal(output_of(chain.middle, lambda: chain(x)), 4 * x + x[:, :1])
    assert calls == ["first", "middle"]
    calls.clear()
    chain(x)  # nothing of it stays
    assert calls == ["first", "middle", "last"]


def test_blocks_are_ordered_by_their_calls() -> None:
    chain = Chain([])
    chain.never = nn.Identity()
    order = call_order(chain, ["last", "never", "first"], lambda: chain(torch.randn(1, 4)))
    assert order == ["first", "last"]
    with pytest.raises(RuntimeError, match="ended without calling the block"):
        output_of(chain.never, lambda: chain(torch.randn(1, 4)))


def captured(student: nn.Module, inputs: RowStore, store: RowStore) -> tuple[BlockData, Tensor]:
    x = torch.randn(7, 4)
    inputs.append({"sample": x, "step": torch.arange(7) % 3}, rows=7)
    data = capture_block(
        Block(name="middle", layers=(), attentions=()),
        Chain([]),
        student,
        inputs,
        lambda unet, step, batch: unet(batch["sample"]),
        StepContext(),
        store,
        batch_size=3,
    )
    return data, x


def test_inputs_are_the_student_s_and_targets_the_teacher_s(tmp_path: Path) -> None:
    student = Chain([])
    with torch.no_grad():
        student.first.factor.fill_(3.0)
        student.middle.factor.fill_(7.0)  # not learned yet: must not matter
    with RowStore(tmp_path / "inputs") as inputs, RowStore(tmp_path / "block") as store:
        data, x = captured(student, inputs, store)
        batch = data.read([6, 1])
    assert len(data) == 7
    torch.testing.assert_close(batch.args[0], 3 * x[[6, 1]])
    torch.testing.assert_close(batch.kwargs["offset"], x[[6, 1], :1])
    assert batch.kwargs["options"] == 5
    torch.testing.assert_close(batch.target, 4 * x[[6, 1]] + x[[6, 1], :1])
    assert batch.step.tolist() == [0, 1]


def test_tensors_in_containers_are_refused(tmp_path: Path) -> None:
    student = Chain([], options={"scale": [torch.ones(1)]})
    with (
        RowStore(tmp_path / "inputs") as inputs,
        RowStore(tmp_path / "block") as store,
        pytest.raises(TypeError, match="argument `options` of middle holds tensors in a dict"),
    ):
        captured(student, inputs, store)
