from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from errata import calibration
from errata.calibration import CalibrationSet
from errata.compress import Recipe
from errata.compress.jobs.stages import open_journal
from errata.compress.quantize import observation
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.quantizers import choose_range
from errata.compress.quantize.step_sketch import StepSketch
from errata.errors import RecipeError
from errata.runtime.scheme import Scheme, sites_of

Ranges = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def scheme(tiny_pipeline: DDIMPipeline) -> Scheme:
    return Scheme.of(tiny_pipeline.unet, Recipe.named("w8a8"), branch=0)


def same(one: Ranges, other: Ranges) -> bool:
    return all(torch.equal(torch.stack(one[name]), torch.stack(other[name])) for name in one)


def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the observation of so many steps end the run once; returns the steps that are observed."""
    observe = observation._observe_step
    seen: list[int] = []

    def watched(*arguments: object) -> StepSketch:
        step = arguments[3]
        assert isinstance(step, int)
        seen.append(step)
        if len(seen) == number:
            raise KeyboardInterrupt
        return observe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(observation, "_observe_step", watched)
    return seen


def resumed(unet: nn.Module, recorded: CalibrationSet, scheme: Scheme, out: Path) -> Ranges:
    """The ranges of a run that goes on after an interruption."""
    with pytest.raises(KeyboardInterrupt), open_journal(out, {}) as journal:
        observe_ranges(unet, recorded, scheme, stage=journal.stage)
    with open_journal(out, {}) as journal:
        return observe_ranges(unet, recorded, scheme, stage=journal.stage)


def test_the_first_layers_range_is_that_of_the_recorded_samples(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, scheme: Scheme
) -> None:
    ranges = observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme)
    assert list(ranges) == [site.name for site in sites_of(scheme)]
    for step in range(6):
        values = torch.cat([record.sample.flatten() for record in tiny_calibration.batches(step)])
        scale, zero_point = choose_range(values, bits=8)
        found = ranges["conv_in.input.0"]
        assert (found[0][step], found[1][step]) == (scale, zero_point)


def test_the_network_is_left_alone(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, scheme: Scheme
) -> None:
    unet = tiny_pipeline.unet
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    processors = [attention.processor for attention in attentions]
    observe_ranges(unet, tiny_calibration, scheme, samples_per_step=1)
    assert [attention.processor for attention in attentions] == processors
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_finished_steps_are_taken_from_the_journal(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    scheme: Scheme,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme)
    seen = interrupted_at(4, monkeypatch)
    again = resumed(tiny_pipeline.unet, tiny_calibration, scheme, tmp_path / "out")
    assert seen == [0, 1, 2, 3, 3, 4, 5]
    assert same(whole, again)


def test_steps_that_share_trajectories_resume_with_the_same_ranges(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    scheme: Scheme,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six steps, two groups of trajectories: each step runs once, and after a break what is needed again."""
    monkeypatch.setattr(observation, "DISTINCT_STEPS", 3)
    whole = observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme)
    seen = interrupted_at(5, monkeypatch)
    again = resumed(tiny_pipeline.unet, tiny_calibration, scheme, tmp_path / "out")
    assert seen == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert same(whole, again)
    some = observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme, steps=[1, 4])
    for name, (scale, zero_point) in some.items():
        assert torch.equal(scale, whole[name][0][[1, 4]])
        assert torch.equal(zero_point, whole[name][1][[1, 4]])


def test_fewer_samples_are_the_first_ones(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, scheme: Scheme, tmp_path: Path
) -> None:
    fewer = calibration.collect(
        tiny_pipeline, tmp_path / "set", num_inference_steps=6, num_samples=4, batch_size=4
    )
    found = observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme, samples_per_step=4)
    assert same(found, observe_ranges(tiny_pipeline.unet, fewer, scheme))


def test_inputs_that_are_not_finite_are_named(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, scheme: Scheme
) -> None:
    layer = tiny_pipeline.unet.down_blocks[1].resnets[0].conv1
    before = layer.weight.detach().clone()
    try:
        layer.weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(
            RecipeError,
            match=r"no range can be chosen for 'down_blocks.1.resnets.0.conv2.input.0' at step 0: .*--keep",
        ):
            observe_ranges(tiny_pipeline.unet, tiny_calibration, scheme)
    finally:
        layer.weight.data.copy_(before)


def test_a_scheme_without_layers_needs_no_ranges(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    assert observe_ranges(tiny_pipeline.unet, tiny_calibration, Scheme()) == {}
