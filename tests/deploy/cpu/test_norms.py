"""Normalization, activation and quantization in one pass, against float64 and against tensor operations."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from errata.deploy.cpu import library, native

needs_compiler = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle())
QUANTIZERS = [(0.02, 30), (0.05, 90)]
RAW = [(0.04, 128), (0.1, 60)]


def expected(x: Tensor, norm: nn.GroupNorm, *, silu: bool) -> Tensor:
    y = nn.functional.group_norm(
        x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )
    return nn.functional.silu(y) if silu else y


def codes_of(y: Tensor, quantizer: tuple[float, int]) -> Tensor:
    scale, zero_point = quantizer
    return (y / scale + zero_point).round().clamp(0, 255)


def flips(found: Tensor, wanted: Tensor) -> float:
    """Share of codes that differ; none may by more than one."""
    difference = (found.double() - wanted).abs()
    assert difference.max() <= 1
    return float((difference > 0).double().mean())


def make_norm(channels: int, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm.requires_grad_(False)


@needs_compiler
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("shape", "widths", "groups"),
    [
        ((2, 48, 9, 9), (48,), 4),
        ((3, 40, 5, 7), (24, 16), 8),
        ((1, 20, 1, 1), (17, 3), 5),
        ((2, 64, 16, 20), (64,), 32),
    ],
)
def test_codes_are_those_of_float64_arithmetic(
    shape: tuple[int, ...], widths: tuple[int, ...], groups: int, silu: bool
) -> None:
    norm, x = make_norm(shape[1], groups), torch.randn(shape) * 3 + 1
    quantizers, raw = QUANTIZERS[: len(widths)], RAW[: len(widths)]
    codes, raw_codes = native.norm_quantize(x, norm, quantizers, widths, silu=silu, raw=raw)
    wanted = expected(x, norm, silu=silu).split(list(widths), dim=1)
    for part, (found, y) in enumerate(zip(codes, wanted, strict=True)):
        assert flips(found, codes_of(y, quantizers[part])) <= 1e-3
        assert found.is_contiguous(memory_format=torch.channels_last)
        if y.numel() > 100:  # another activation, or another part's scale, would show
            other = expected(x, norm, silu=not silu).split(list(widths), dim=1)[part]
            assert (found != codes_of(other, quantizers[part])).double().mean() > 0.01
    for part, (found, y) in enumerate(zip(raw_codes, x.double().split(list(widths), dim=1), strict=True)):
        assert flips(found, codes_of(y, raw[part])) <= 1e-3


@needs_compiler
def test_a_large_mean_costs_no_digits() -> None:
    """A variance from float32 sums of squares, 9e6, would be off by about its own size."""
    norm, x = make_norm(16, 4), torch.randn(2, 16, 12, 12) + 3000
    ((found,), _) = native.norm_quantize(x, norm, [(0.03, 100)], [16], silu=False)
    wanted = codes_of(expected(x, norm, silu=False), (0.03, 100))
    assert flips(found, wanted) <= 0.03  # x itself has but three decimals
    norm.weight.mul_(1.5)
    ((other,), _) = native.norm_quantize(x, norm, [(0.03, 100)], [16], silu=False)
    assert (other != wanted).double().mean() > 0.5


@needs_compiler
def test_a_sample_does_not_depend_on_its_neighbours_or_on_the_number_of_threads() -> None:
    norm, x = make_norm(32, 8), torch.randn(3, 32, 20, 20)
    ((together,), _) = native.norm_quantize(x, norm, [(0.03, 100)], [32], silu=True)
    ((alone,), _) = native.norm_quantize(x[1:2], norm, [(0.03, 100)], [32], silu=True)
    assert torch.equal(together[1:2], alone)
    torch.set_num_threads(3)
    try:
        ((threaded,), _) = native.norm_quantize(x, norm, [(0.03, 100)], [32], silu=True)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, threaded)


@needs_compiler
@pytest.mark.parametrize("channels", [4, 36])
@pytest.mark.parametrize("factor", [1e4, 1e30])
def test_extremes_saturate(factor: float, channels: int) -> None:
    norm = nn.GroupNorm(1, channels, affine=True).requires_grad_(False)
    norm.weight.fill_(factor)
    x = torch.randn(1, channels, 8, 8)
    ((found,), _) = native.norm_quantize(x, norm, [(0.01, 7)], [channels], silu=True)
    assert set(found.unique().tolist()) == {7, 255}
    ((found,), _) = native.norm_quantize(x, norm, [(0.01, 7)], [channels], silu=False)
    assert set(found.unique().tolist()) == {0, 255}


@needs_compiler
@pytest.mark.parametrize("silu", [True, False])
def test_what_is_no_number_has_the_code_zero(silu: bool) -> None:
    norm, x = make_norm(36, 4), torch.full((1, 36, 4, 4), torch.nan)
    ((found,), _) = native.norm_quantize(x, norm, [(0.01, 7)], [36], silu=silu)
    assert not found.any()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Asks for the native code anew, before the test and after it."""

    def forget() -> None:
        library.obstacle.cache_clear()
        library.library.cache_clear()

    forget()
    yield
    forget()


@needs_compiler
def test_it_is_compiled_once_and_kept(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    assert native.obstacle() == ""
    (file,) = (tmp_path / "cache").iterdir()
    made = file.stat().st_mtime_ns
    library.library.cache_clear()
    library.library()
    assert file.stat().st_mtime_ns == made


def test_without_a_compiler_it_says_so(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.obstacle() == "no C compiler (cc, gcc or clang) on the PATH"


def test_a_failing_compiler_leaves_nothing_behind(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such option" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    assert native.obstacle() == f"{compiler} failed: no such option"
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 37, 320), (5, 7), (1, 1, 16), (3, 130)])
def test_codes_of_rows_are_those_of_float64_arithmetic(shape: tuple[int, ...]) -> None:
    norm = nn.LayerNorm(shape[-1], eps=1e-5).requires_grad_(False)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape) * 3 + 20
    y = nn.functional.layer_norm(x.double(), shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    for codes, quantizer in zip(native.layer_norm_quantize(x, norm, QUANTIZERS), QUANTIZERS, strict=True):
        assert codes.dtype is torch.uint8
        assert codes.shape == x.shape
        assert flips(codes, codes_of(y, quantizer)) <= 0.02
        assert flips_of_another(codes, codes_of(y.roll(1, dims=-1), quantizer)) > 0.2


def flips_of_another(found: Tensor, other: Tensor) -> float:
    return float((found.double() != other).double().mean())


@needs_compiler
def test_norms_of_other_channels_are_refused() -> None:
    x, rows = torch.randn(2, 16, 3, 3), torch.randn(5, 16)
    for channels, widths in ((32, (16,)), (8, (8,)), (16, (16, 4)), (16, (20,))):
        quantizers = QUANTIZERS[: len(widths)]
        with pytest.raises(ValueError, match="channels"):
            native.norm_quantize(x, make_norm(channels, 4), quantizers, widths, silu=True)
    for channels in (8, 32):
        with pytest.raises(ValueError, match="channels"):
            native.layer_norm_quantize(rows, nn.LayerNorm(channels), QUANTIZERS)
