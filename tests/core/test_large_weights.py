from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from errata import large_weights
from errata.large_weights import (
    StoredConv2d,
    StoredLinear,
    compute_in_float32_,
    in_stored_type,
    replace_parameter,
    sharing_copy,
    stored_weights,
)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_weights, "LARGE", 500)


class Network(nn.Module):
    """A small first convolution, then large layers, a normalization and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.linear = nn.Linear(16, 32)
        self.register_buffer("shift", torch.randn(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.first(x)) + self.shift)
        return self.linear(x.movedim(1, -1))


@pytest.fixture
def network() -> Network:
    return Network().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32_as_if_converted(
    network: Network, x: Tensor, dtype: torch.dtype
) -> None:
    network.to(dtype)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    right = sharing_copy(network, None).float()(x)
    large = [network.conv.weight.data_ptr(), network.linear.weight.data_ptr()]
    compute_in_float32_(network)
    assert torch.equal(network(x), right)
    assert [network.conv.weight.data_ptr(), network.linear.weight.data_ptr()] == large
    assert network.conv.weight.dtype == network.linear.weight.dtype == dtype
    assert network.first.weight.dtype == network.norm.weight.dtype == network.shift.dtype == torch.float32
    assert set(stored_weights(network)) == {"conv.weight", "linear.weight"}
    stored = in_stored_type(network).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    assert {value.dtype for value in stored.values()} == {dtype}


def test_a_parameter_that_half_precision_cannot_hold_keeps_float32(network: Network) -> None:
    network.half()
    compute_in_float32_(network)
    with torch.no_grad():
        network.norm.bias[0] = 1 + 2**-20
    assert in_stored_type(network) is network


def test_what_was_never_in_half_precision_is_saved_as_it_is(network: Network) -> None:
    assert in_stored_type(network) is network
    assert in_stored_type(network.half()) is network


def test_a_copy_shares_large_weights_and_nothing_else(network: Network, x: Tensor) -> None:
    made = sharing_copy(network.train(), torch.float32)
    assert not made.training
    same = {
        name
        for name, value in made.named_parameters()
        if value.data_ptr() == network.get_parameter(name).data_ptr()
    }
    assert same == {"conv.weight", "linear.weight"}
    assert made.get_buffer("shift").data_ptr() != network.get_buffer("shift").data_ptr()
    assert torch.equal(made(x), network(x))
    assert type(made.conv) is nn.Conv2d  # nothing to convert


def test_a_copy_in_another_type_converts_in_the_call(network: Network, x: Tensor) -> None:
    made = sharing_copy(network, torch.bfloat16, float32_modules=("norm",), channels_last=True)
    assert isinstance(made.conv, StoredConv2d)
    assert isinstance(made.linear, StoredLinear)
    assert made.conv.weight.data_ptr() == network.conv.weight.data_ptr()
    assert made.first.weight.dtype == torch.bfloat16
    assert made.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert made.norm.weight.dtype == torch.float32
    layer = sharing_copy(network.conv, torch.bfloat16)
    hidden = torch.randn(3, 16, 8, 8).bfloat16()
    bias = network.conv.bias
    assert bias is not None
    expected = nn.functional.conv2d(
        hidden, network.conv.weight.bfloat16(), bias.bfloat16(), stride=2, padding=1
    )
    assert layer(hidden).dtype == torch.bfloat16
    assert torch.equal(layer(hidden), expected)


def test_another_parameter_leaves_the_shared_one_alone(network: Network, x: Tensor) -> None:
    made = sharing_copy(network, torch.float32)
    before = network(x)
    replace_parameter(made, "conv.weight", torch.zeros_like(network.conv.weight))
    assert torch.equal(network(x), before)
    assert not made.conv.weight.any()


def test_a_class_derived_from_a_layer_is_copied(network: Network) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Scaled(64, 64)
    made = sharing_copy(nn.Sequential(layer), torch.bfloat16)
    assert type(made[0]) is Scaled
    assert made[0].weight.dtype == torch.bfloat16
    network.linear = Scaled(16, 32)
    compute_in_float32_(network.half())
    assert network.linear.weight.dtype == torch.float32


class Tied(nn.Module):
    """A large weight that an embedding reads too, as a language model's first and last layer may."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.last = nn.Linear(16, 40, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.embedding(words))


def test_a_weight_that_another_module_reads_is_converted_and_stays_one() -> None:
    network, words = Tied().requires_grad_(False).half(), torch.arange(5)
    right = sharing_copy(network, None).float()(words)
    made = sharing_copy(network, torch.bfloat16)
    assert made(words).dtype == torch.bfloat16
    assert made.embedding.weight is made.last.weight
    compute_in_float32_(network)
    assert network.embedding.weight is network.last.weight
    assert torch.equal(network(words), right)
    assert not stored_weights(network)
