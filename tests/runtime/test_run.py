import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from errata.calibration import nest
from errata.compress import CacheSchedule, CompressedPipeline
from errata.errors import ArtifactMismatchError
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.run import Run
from errata.runtime.step_context import StepContext
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet import BranchedUNet

Network = Callable[[str], Any]
Make = Callable[[str], CompressedPipeline]


def test_calls_are_counted_and_scheduled(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    run = compressed.start()
    run.pipe(**compressed.arguments({"batch_size": 1}))
    assert run.kinds == ["full", "cached", "cached", "full", "cached", "cached"]
    assert [call.step for call in run.latest] == [5]


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
    with pytest.raises(ArtifactMismatchError, match="timestep 7 was not recorded.*6 timesteps"):
        tiny_compressed("w8a8").pipe.unet(torch.randn(1, 1, 8, 8), 7)


def test_one_timestep_for_each_row_must_be_the_same(tiny_compressed: Make) -> None:
    unet = tiny_compressed("w8a8").pipe.unet
    x, time = torch.randn(2, 1, 8, 8), tiny_compressed("w8a8").denoiser.timesteps[1]
    assert torch.equal(unet(x, torch.full((2,), time)).sample, unet(x, time).sample)
    with pytest.raises(ArtifactMismatchError, match="rows of a batch are at different timesteps"):
        unet(x, torch.tensor([time, time + 1]))


def test_a_foreign_schedule_is_refused(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w8a8")
    run = compressed.start()
    with pytest.raises(ArtifactMismatchError, match="step 0 is at timestep 7, recorded was"):
        run.pipe.unet(torch.randn(1, 1, 8, 8), 7)
    with pytest.raises(ArtifactMismatchError, match="recorded"):
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


def stepped(case: Any, *, interval: int = 1, times: tuple[float, ...] | None = None) -> SteppedUNet:
    """The network of a case in place of itself, at six steps."""
    times = times or tuple(case.time + 10 * step for step in range(6))
    schedule = CacheSchedule.uncached(len(times))
    if interval > 1:
        schedule = CacheSchedule.uniform(len(times), interval=interval, branch=2)
    branched = BranchedUNet(case.unet)
    denoiser = UNetDenoiser(branched, StepContext(), schedule, times)
    return SteppedUNet(denoiser, case.unet.config, module=branched)


@pytest.mark.parametrize("name", ["pixel", "labels", "sd", "sdxl", "upscaler", "audioldm2", "k"])
def test_it_takes_what_the_float_network_takes(network: Network, name: str) -> None:
    case = network(name)
    unet, named = stepped(case), nest(case.cond)
    expected = case.own_forward()
    assert torch.equal(unet(case.x, case.time, **named).sample, expected)
    assert torch.equal(unet(sample=case.x, timestep=case.time, **named).sample, expected)
    assert torch.equal(unet(case.x, torch.tensor([case.time] * 2), **named, return_dict=False)[0], expected)
    nothing: dict[str, Any] = (
        {} if name in ("pixel", "labels") else {"cross_attention_kwargs": {}, "timestep_cond": None}
    )
    assert torch.equal(unet(case.x, case.time, **(nothing | named)).sample, expected)
    order = ["encoder_hidden_states", "class_labels"] if name not in ("pixel", "labels") else ["class_labels"]
    positional = [named.pop(key, None) for key in order]
    assert torch.equal(unet(case.x, case.time, *positional, **named).sample, expected)
    assert torch.equal(unet(case.x, 7, *positional, **named, step=0).sample, expected)


def test_arguments_that_do_not_fit_are_refused(network: Network) -> None:
    case = network("sd")
    unet, tokens = stepped(case), case.cond["encoder_hidden_states"]
    with pytest.raises(TypeError, match="takes sample, timestep, encoder_hidden_states.* 'ip_scale'"):
        unet(case.x, case.time, tokens, ip_scale=1)
    with pytest.raises(TypeError, match="missing a required argument: 'encoder_hidden_states'"):
        unet(case.x, case.time)
    with pytest.raises(ArtifactMismatchError, match="tensors only: .*`cross_attention_kwargs.scale` is 0.5"):
        unet(case.x, case.time, tokens, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(TypeError, match="takes sample, timestep, class_labels, return_dict and step"):
        stepped(network("pixel"))(case.x, case.time, tokens, tokens, tokens)


def test_pipelines_find_what_they_look_up(network: Network) -> None:
    sdxl = copy.deepcopy(network("sdxl").unet)
    width = sdxl.add_embedding.linear_1.in_features
    sdxl.add_embedding.linear_1 = nn.Identity()  # as a quantized layer: it has no such attribute
    unet = stepped(SimpleNamespace(unet=sdxl, time=1.0))
    assert unet.add_embedding.linear_1.in_features == width
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))
    assert unet.config.in_channels == 4
    assert not hasattr(stepped(network("sd")), "add_embedding")


def test_a_half_precision_pipeline_gets_half_precision_back(network: Network) -> None:
    case = network("sdxl")
    half = {name: value.half() for name, value in case.cond.items()}
    rounded = {name: value.float() for name, value in half.items()}
    output = stepped(case)(case.x.half(), torch.tensor(case.time), **nest(half)).sample
    assert output.dtype == torch.float16
    assert torch.equal(output, case.own_forward(x=case.x.half().float(), cond=rounded).half())
    labels = network("labels")
    assert stepped(labels)(labels.x.half(), labels.time, **labels.cond).sample.dtype == torch.float16


def test_timesteps_may_differ_in_their_last_bits(network: Network) -> None:
    """A logarithm on another device; but never enough to reach the neighbouring step."""
    case = network("k")
    sigmas = torch.linspace(0.4, 0.01, 1000)
    times = tuple(float(time) for time in sigmas.log() * 0.25)
    unet = stepped(case, times=times)
    for step in (0, 500, 999):
        for moved in (times[step] * (1 + 1e-7), times[step] * (1 - 1e-7), times[step]):
            assert unet.step_of(moved) == step
    with pytest.raises(ArtifactMismatchError, match="was not recorded"):
        unet.step_of((times[500] + times[501]) / 2)


class TwoHalves(DiffusionPipeline):
    """Guidance: both halves in one batch of the network."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, times: tuple[float, ...], x: Tensor, cond: dict[str, Any]) -> list[Tensor]:
        outputs = []
        for step, time in enumerate(times):
            pair = self.unet(torch.cat([x, x]) + 0.1 * step, torch.tensor(time), **cond, return_dict=False)[0]
            outputs.append(pair)
        return outputs


@torch.no_grad()
def test_a_run_serves_both_halves_of_a_guided_batch(network: Network) -> None:
    case = network("sd")
    unet = stepped(case, interval=3)
    run = Run(TwoHalves(unet, DDIMScheduler()))
    outputs = run.pipe(unet.denoiser.timesteps, case.x[:1], nest(case.cond))
    assert run.kinds == ["full", "cached", "cached"] * 2
    last = run.latest[-1]
    assert last.feature is not None
    assert last.feature.shape[0] == 2
    assert last.cond.keys() == case.cond.keys()
    model, features = BranchedUNet(case.unet), dict[int, Tensor]()
    for step, time in enumerate(unet.denoiser.timesteps):
        x = case.x[:1] + 0.1 * step
        for half in range(2):
            cond = {name: value[half : half + 1] for name, value in case.cond.items()}
            if step % 3 == 0:
                expected, feature = model.full(x, time, cond, branch=2)
                assert feature is not None
                features[half] = feature
            else:
                expected = model.cached(x, time, cond, features[half], branch=2)
            torch.testing.assert_close(outputs[step][half : half + 1], expected, rtol=0, atol=1e-5)
    assert (outputs[1][0] - outputs[1][1]).abs().max() > 1e-3
    exact = case.own_forward(x=torch.cat([case.x[:1]] * 2) + 0.1, time=unet.denoiser.timesteps[1])
    assert (outputs[1] - exact).abs().max() > 1e-3


def test_cost_leaves_constant_conditions_as_they_are(network: Network) -> None:
    case = network("sd")
    unet = stepped(case, interval=3)
    shapes: list[list[int]] = []
    full = unet.denoiser.full

    def spy(x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        shapes.append([x.shape[0], *(cond[name].shape[0] for name in sorted(cond))])
        return full(x, step, cond)

    cond = {"encoder_hidden_states": case.cond["encoder_hidden_states"]}
    unet(case.x, case.time, **cond)
    unet.denoiser._latest[3]["added_cond_kwargs.table"] = torch.randn(5, 3)  # type: ignore[attr-defined]
    unet.denoiser.full = spy  # type: ignore[method-assign]
    assert unet.denoiser.cost("full", batch_size=3) > 0
    assert unet.denoiser.cost("cached", batch_size=3) > 0
    assert set(map(tuple, shapes)) == {(3, 5, 3)}


def test_layers_learn_the_kind_of_a_call(network: Network) -> None:
    case = network("pixel")
    unet = stepped(case, interval=3)
    kinds: list[tuple[Any, str]] = []
    context: StepContext = unet.denoiser._context  # type: ignore[attr-defined]
    handle = case.unet.conv_out.register_forward_hook(lambda *_: kinds.append((context.step, context.kind)))
    _, feature = unet.denoiser.full(case.x, 3, {})
    assert feature is not None
    unet.denoiser.cached(case.x, 4, {}, feature)
    handle.remove()
    assert kinds == [(3, "full"), (4, "cached")]
