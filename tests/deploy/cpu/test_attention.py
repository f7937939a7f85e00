"""The attention kernel, each way to multiply that this CPU has, against float64 arithmetic."""

from collections.abc import Iterator

import pytest
import torch
from cpu_builds import NATIVE, running
from torch import Tensor

from errata.deploy.cpu import attention_kernel
from errata.deploy.cpu.int8 import quantize_to_uint8

# Of the size of the output: in bfloat16 scores, weights and values are rounded to 2^-9 of themselves.
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
FLOATS = attention_kernel.AttentionKind.FLOATS


@pytest.fixture(params=[*((NATIVE, kind) for kind in attention_kernel.AttentionKind), ("avx2", FLOATS)])
def kind(request: pytest.FixtureRequest) -> Iterator[attention_kernel.AttentionKind]:
    build, kind = request.param
    with running(build):
        if kind not in attention_kernel.attention_kinds():
            pytest.skip("this CPU does not multiply so")
        yield kind


def expected(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    query, key, value = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = scale * query @ key.mT
    if mask is not None:
        scores = scores + mask.double().unflatten(0, (-1, heads))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def inputs(batch: int, queries: int, keys: int, channels: int, *, size: float = 1.0) -> list[Tensor]:
    return [size * torch.randn(batch, tokens, channels) for tokens in (queries, keys)] + [
        torch.randn(batch, keys, channels)
    ]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def check(found: Tensor, wanted: Tensor, kind: attention_kernel.AttentionKind) -> None:
    bound = BOUNDS[kind.dtype]
    assert rms(found - wanted) <= bound * rms(wanted)
    assert float((found - wanted).abs().max()) <= 10 * bound * float(wanted.abs().max())
    assert rms(wanted - wanted.roll(1, dims=1)) > 0.1 * rms(wanted)  # another query's would show


@pytest.mark.parametrize(
    ("heads", "width", "queries", "keys"),
    [
        (4, 8, 50, 50),
        (3, 40, 70, 300),  # more than a block of keys
        (2, 80, 64, 77),
        (1, 128, 33, 1),
        (2, 160, 5, 64),
        (1, 256, 49, 513),
        (3, 7, 6, 31),  # odd channels
        (1, 97, 65, 257),
    ],
)
# Scores that are bounded by lengths, and ones that are not.
@pytest.mark.parametrize("size", [1.0, 5.0])
def test_it_equals_float64_arithmetic(
    heads: int, width: int, queries: int, keys: int, size: float, kind: attention_kernel.AttentionKind
) -> None:
    query, key, value = inputs(2, queries, keys, heads * width, size=size)
    scale = 1.5 * size**-2 * width**-0.5 if size == 1 else 0.2
    rounded = [x.bfloat16() for x in (query, key, value)]
    wanted = expected(*(x.float() for x in rounded), heads=heads, scale=scale)
    for given in (rounded, [x.float() for x in rounded]):
        found = attention_kernel.attention(*given, heads=heads, scale=scale, kind=kind)
        assert found.dtype is torch.float32
        if size == 1 and keys > 1:
            check(found, wanted, kind)
        else:  # rounded queries move scores of a hundred by tenths
            bound = BOUNDS[kind.dtype]
            assert rms(found - wanted) <= (bound if keys == 1 else 10 * bound) * rms(wanted)


@pytest.mark.parametrize("per_query", [True, False])
def test_a_mask_is_added_to_the_scores(per_query: bool, kind: attention_kernel.AttentionKind) -> None:
    heads, queries, keys = 2, 37, 300
    query, key, value = inputs(3, queries, keys, heads * 24)
    mask = torch.randn(3 * heads, queries if per_query else 1, keys)
    mask[:, :, 100:290] = -10000.0
    mask[0, :, :99] = -torch.inf
    options = {"heads": heads, "scale": 24**-0.5}
    found = attention_kernel.attention(query, key, value, **options, mask=mask, kind=kind)  # type: ignore[arg-type]
    wanted = expected(query, key, value, **options, mask=mask)  # type: ignore[arg-type]
    check(found, wanted, kind)
    unmasked = attention_kernel.attention(query, key, value, **options, kind=kind)  # type: ignore[arg-type]
    assert rms(unmasked - wanted) > 0.1 * rms(wanted)


def test_codes_are_those_of_the_output(kind: attention_kernel.AttentionKind) -> None:
    query, key, value = inputs(2, 45, 90, 80)
    options = {"heads": 2, "scale": 0.2, "kind": kind}
    output = attention_kernel.attention(query, key, value, **options)  # type: ignore[arg-type]
    codes = attention_kernel.attention(query, key, value, **options, codes=(0.01, 90))  # type: ignore[arg-type]
    wanted = quantize_to_uint8(output, 0.01, 90)
    assert codes.dtype is torch.uint8
    assert {0, 255} <= set(wanted.flatten().tolist())  # some are clamped
    difference = (codes.int() - wanted.int()).abs()
    assert int(difference.max()) <= 1  # a tie may fall to the other side
    assert float(difference.float().mean()) < 1e-3


def test_neither_threads_nor_neighbours_change_an_attention(kind: attention_kernel.AttentionKind) -> None:
    query, key, value = inputs(3, 130, 150, 96)
    together = attention_kernel.attention(query, key, value, heads=4, scale=0.3, kind=kind)
    alone = attention_kernel.attention(query[1:2], key[1:2], value[1:2], heads=4, scale=0.3, kind=kind)
    assert torch.equal(together[1:2], alone)
    torch.set_num_threads(3)
    try:
        threaded = attention_kernel.attention(query, key, value, heads=4, scale=0.3, kind=kind)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, threaded)


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        (((2, 5, 32), (2, 6, 32), (2, 7, 32)), 2),
        (((2, 5, 32), (1, 6, 32), (1, 6, 32)), 2),
        (((2, 5, 32), (2, 6, 64), (2, 6, 64)), 2),
        (((2, 5, 32), (2, 6, 32), (2, 6, 32)), 3),
        (((2, 5, 257), (2, 6, 257), (2, 6, 257)), 1),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], heads: int, kind: attention_kernel.AttentionKind
) -> None:
    given = [torch.randn(shape) for shape in shapes]
    with pytest.raises(ValueError, match="channels|key"):
        attention_kernel.attention(*given, heads=heads, scale=1.0, kind=kind)


@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 5, 1), (4, 5, 7), (2, 5, 6), (4, 1, 5, 6), (5, 6)])
def test_a_mask_that_does_not_fit_is_refused(
    shape: tuple[int, ...], kind: attention_kernel.AttentionKind
) -> None:
    given = inputs(2, 5, 6, 32)
    with pytest.raises(ValueError, match="mask"):
        attention_kernel.attention(*given, heads=2, scale=1.0, mask=torch.zeros(shape), kind=kind)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_does_not_vanish(which: int, kind: attention_kernel.AttentionKind) -> None:
    given = inputs(2, 40, 70, 32)
    given[which][1, 3, 5] = torch.nan
    found = attention_kernel.attention(*given, heads=2, scale=0.3, kind=kind)
    assert bool(found[1].isnan().any())
    assert bool(found[0].isfinite().all())
