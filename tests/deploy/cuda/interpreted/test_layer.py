"""Whole layers on the Triton kernels against float64 arithmetic on their codes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from errata.deploy.cuda.selection import Fixed

# Of the largest output. In half precision the output is rounded once, at the end; Triton's interpreter cuts
# bfloat16 off where a device rounds to nearest, hence twice its half unit.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
CASES = [
    (nn.Conv2d(16, 24, 3, padding=1), (16,), (2, 16, 5, 6)),
    (nn.Conv2d(16, 24, 3, padding=1, stride=2), (16,), (2, 16, 6, 5)),
    (nn.Conv2d(16, 24, 1, stride=2, bias=False), (16,), (2, 16, 5, 5)),
    (nn.Conv2d(40, 24, 1, bias=False), (16, 24), (2, 40, 4, 4)),
    (nn.Conv2d(37, 21, 3, padding=1), (20, 17), (1, 37, 4, 5)),
    (nn.Linear(16, 32), (16,), (2, 10, 16)),
    (nn.Linear(70, 33, bias=False), (70,), (1, 70)),
    (nn.Linear(40, 32), (16, 24), (77, 40)),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_a_layer_equals_float64_arithmetic_on_its_codes(
    module: nn.Conv2d | nn.Linear,
    widths: tuple[int, ...],
    shape: tuple[int, ...],
    bits: int,
    make_case: Callable[..., Any],
) -> None:
    check(make_case(module, widths, Fixed(), bits=bits), torch.randn(shape) * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 4, 7])
def test_half_precision_in_and_out(dtype: torch.dtype, index: int, make_case: Callable[..., Any]) -> None:
    module, widths, shape = CASES[index]
    check(make_case(module, widths, Fixed()), (torch.randn(shape) * 2).to(dtype))


@pytest.mark.parametrize("index", [0, 4, 7])
def test_a_residual_is_added_in_the_kernel(index: int, make_case: Callable[..., Any]) -> None:
    module, widths, shape = CASES[index]
    case = make_case(module, widths, Fixed())
    x = torch.randn(shape) * 2
    residual = torch.randn_like(case.expected(x, 0).float()) * 5
    check(case, x, residual)


def check(case: Any, x: Tensor, residual: Tensor | None = None) -> None:
    given = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    outputs = []
    for step in range(3):
        with case.context.at(step):
            outputs.append(case.layer(given, residual))
        expected = case.expected(x, step, residual)
        bound = BOUNDS[x.dtype] * expected.abs().max()
        assert outputs[-1].dtype is x.dtype
        assert outputs[-1].shape == expected.shape
        assert (outputs[-1] - expected).abs().max() <= bound
        others = [(output - expected).abs().max() for output in outputs[:-1]]
        assert all(other > 10 * bound for other in others)  # another step's scale would show
    if x.ndim == 4:
        assert outputs[-1].is_contiguous(memory_format=torch.channels_last)


def test_layouts_of_the_input_do_not_matter(make_case: Callable[..., Any]) -> None:
    case = make_case(*CASES[4][:2], Fixed())
    x = torch.randn(CASES[4][2])
    with case.context.at(1):
        layouts = [x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT]
        outputs = [case.layer(given) for given in layouts]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("bits", [8, 4])
def test_one_compiled_program_serves_every_step(bits: int, make_case: Callable[..., Any]) -> None:
    case = make_case(*CASES[4][:2], Fixed(), bits=bits)
    x, counter = torch.randn(CASES[4][2]), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.layer, backend=counter, fullgraph=True)
    outputs = []
    with torch.no_grad():
        for step in (0, 1, 2, 1):
            with case.context.at(step):
                outputs.append(compiled(x))
                assert torch.equal(outputs[-1], case.layer(x))
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[3])
