import pytest
import torch
from torch import Tensor

from errata.compress.quantize import step_sketch
from errata.compress.quantize.quantizers import choose_range
from errata.compress.quantize.step_sketch import StepSketch, in_memory_order, spread_values


def held(sketch: StepSketch) -> int:
    """Bytes of all that it keeps."""
    kept: list[Tensor] = []
    for site in sketch._sites.values():
        kept += [site.low, site.high, *site.values, *([] if site.counts is None else [site.counts])]
    return sum(value.numel() * value.element_size() for value in kept)


def test_what_is_kept_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sketch, "VALUES_PER_STEP", 1000)
    sizes = []
    for batches in (1, 4, 20):
        sketch, extremes = StepSketch(samples=10 * batches), []
        for index in range(batches):
            sketch.expect(10)
            values = torch.randn(10, 300, generator=torch.Generator().manual_seed(index))
            extremes += [values.min(), values.max()]
            sketch.add("x", values)
        site = sketch._sites["x"]
        assert site.counts is not None
        assert 3000 <= int(site.counts.sum()) <= 4000 + 3 * batches
        assert (site.low, site.high) == (min(extremes), max(extremes))
        sizes.append(held(sketch))
    assert sizes[0] == sizes[1] == sizes[2]


def test_few_values_are_kept_exactly_over_batches_and_pieces() -> None:
    values = torch.randn(7, 3, 40)
    sketch = StepSketch(samples=7)
    for batch in values.split([3, 3, 1]):
        sketch.expect(len(batch))
        for piece in batch.split(20, dim=2):
            sketch.add("x", piece, part=0.5)
    seen = torch.cat([values.flatten(), values.min()[None], values.max()[None]])
    assert sketch.choose_range("x", bits=4) == choose_range(seen, bits=4)


def test_steps_together_are_one_step_with_all_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (10**6, 10):
        monkeypatch.setattr(step_sketch, "VALUES_PER_STEP", limit)
        values = torch.randn(8, 1000)
        monkeypatch.setattr(step_sketch, "_TIMES_IN_HISTOGRAM", 10**6)  # all of them
        parts = [StepSketch(samples=8) for _ in range(2)]
        for sketch, rows in zip(parts, values.split(4), strict=True):
            sketch.expect(4)
            sketch.add("x", rows)
        whole = StepSketch(samples=8)
        whole.expect(8)
        whole.add("x", values)
        together = StepSketch.together(parts)
        assert together.choose_range("x", bits=6) == whole.choose_range("x", bits=6)
        assert int(parts[0]._sites["x"].high > values[:4].max()) == 0  # left as it was


def test_a_site_whose_batches_differ_in_length_keeps_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sketch, "VALUES_PER_STEP", 100)
    sketch = StepSketch(samples=2)
    for length in (40, 400):
        sketch.expect(1)
        sketch.add("x", torch.ones(1, length))
    counts = sketch._sites["x"].counts
    assert counts is not None
    assert int(counts.sum()) == 40 + 200


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [slice(None), slice(8, 20)])
def test_values_come_evenly_from_every_sample_channel_and_row(
    memory_format: torch.memory_format, channels: slice
) -> None:
    names = torch.arange(4 * 24 * 8 * 8).reshape(4, 24, 8, 8).float()
    x = names.contiguous(memory_format=memory_format)[:, channels]
    found = spread_values(in_memory_order(x), x.numel() // 8).long()
    assert len(found.unique()) == x.numel() // 8
    assert set(found.tolist()) <= set(x.flatten().long().tolist())
    for dim, stride in ((0, 24 * 64), (1, 64), (2, 8), (3, 1)):
        places = found // stride % names.shape[dim]
        counts = places.bincount()[places.unique()]
        assert len(counts) == x.shape[dim]
        assert counts.max() <= 1.5 * counts.min()


def test_what_was_not_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no range fits"):
        StepSketch(samples=1).choose_range("x", bits=8)
