from collections.abc import Callable

import pytest
import torch

from errata.compress import CompressedPipeline
from errata.errors import ArtifactMismatch

Make = Callable[[str], CompressedPipeline]


def test_calls_are_counted_and_scheduled(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    run = compressed.start()
    run.pipe(**compressed.arguments({"batch_size": 1}))
    assert run.kinds == ["full", "cached", "cached", "full", "cached", "cached"]
    assert run.last is not None
    assert run.last.step == 5


def test_a_run_leaves_no_trace_on_the_pipeline(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    before = dict(vars(compressed.pipe)), dict(vars(compressed.pipe.scheduler))
    compressed(batch_size=1)
    assert vars(compressed.pipe) == before[0]
    assert vars(compressed.pipe.scheduler).keys() == before[1].keys()
    assert compressed.pipe.scheduler.num_inference_steps == before[1]["num_inference_steps"]


def test_two_interleaved_runs_do_not_meet(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    x = torch.randn(2, 1, 1, 8, 8)
    alone = []
    for sample in x:
        run = compressed.start()
        alone.append([run.pipe.unet(sample, time).sample for time in compressed.denoiser.timesteps])
    runs = [compressed.start(), compressed.start()]
    together: list[list[torch.Tensor]] = [[], []]
    for time in compressed.denoiser.timesteps:
        for index, run in enumerate(runs):
            together[index].append(run.pipe.unet(x[index], time).sample)
    for index in range(2):
        assert all(torch.equal(a, b) for a, b in zip(alone[index], together[index], strict=True))


def test_a_direct_call_is_a_full_one(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    x, times = torch.randn(1, 1, 8, 8), compressed.denoiser.timesteps
    direct = compressed.pipe.unet(x, times[1]).sample
    assert torch.equal(direct, compressed.denoiser.full(x, 1, {})[0])
    assert torch.equal(
        compressed.pipe.unet(x, times[1], step=4).sample, compressed.denoiser.full(x, 4, {})[0]
    )
    assert torch.equal(compressed.pipe.unet(x, times[1], return_dict=False)[0], direct)


def test_an_unknown_timestep_is_refused(tiny_compressed: Make) -> None:
    with pytest.raises(ArtifactMismatch, match="timestep 7 was not recorded.*6 timesteps"):
        tiny_compressed("w8a8").pipe.unet(torch.randn(1, 1, 8, 8), 7)


def test_one_timestep_for_each_row_must_be_the_same(tiny_compressed: Make) -> None:
    unet = tiny_compressed("w8a8").pipe.unet
    x, time = torch.randn(2, 1, 8, 8), tiny_compressed("w8a8").denoiser.timesteps[1]
    assert torch.equal(unet(x, torch.full((2,), time)).sample, unet(x, time).sample)
    with pytest.raises(ArtifactMismatch, match="rows of a batch are at different timesteps"):
        unet(x, torch.tensor([time, time + 1]))


def test_a_foreign_schedule_is_refused(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8")
    run = compressed.start()
    with pytest.raises(ArtifactMismatch, match="step 0 is at timestep 7, recorded was"):
        run.pipe.unet(torch.randn(1, 1, 8, 8), 7)
    with pytest.raises(ArtifactMismatch, match="recorded"):
        compressed.start().pipe(num_inference_steps=8)


def test_cost_needs_a_shape_and_keeps_it(
    tiny_compressed: Make, tiny_artifact: Callable[[str], object]
) -> None:
    compressed = CompressedPipeline(
        tiny_compressed("deepcache-3").float_pipe,
        tiny_compressed("deepcache-3").compression,
        tiny_compressed("deepcache-3").path,
    )
    with pytest.raises(ValueError, match="run the pipeline once"):
        compressed.denoiser.cost("full")
    compressed(batch_size=2)
    before = torch.get_rng_state()
    costs = [compressed.denoiser.cost(kind, batch_size=2) for kind in ("full", "cached")]
    assert torch.equal(torch.get_rng_state(), before)
    assert costs[0] > 0
    assert costs[1] > 0
    tiny_compressed("w8a8")(batch_size=1)
    with pytest.raises(ValueError, match="no cached call to measure"):
        tiny_compressed("w8a8").denoiser.cost("cached")
    assert compressed.denoiser.cost("full", batch_size=2) == costs[0]


def test_a_feature_of_another_batch_is_refused(tiny_compressed: Make) -> None:
    denoiser = tiny_compressed("deepcache-3").denoiser
    _, feature = denoiser.full(torch.randn(2, 1, 8, 8), 0, {})
    assert feature is not None
    with pytest.raises(ValueError, match="holds 2 samples, the input 3"):
        denoiser.cached(torch.randn(3, 1, 8, 8), 1, {}, feature)
    with pytest.raises(ValueError, match="no feature cache"):
        tiny_compressed("w8a8").denoiser.cached(torch.randn(2, 1, 8, 8), 1, {}, feature)
    with pytest.raises(ValueError, match="step 6 was not recorded"):
        denoiser.full(torch.randn(2, 1, 8, 8), 6, {})
