"""What is recorded is what the float pipeline computes, and collecting changes nothing else."""

import contextlib
import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from errata import CalibrationError, calibration
from errata.calibration.recorder import Trajectory
from errata.calibration.shards import write_shard
from errata.journal import Journal

Guided = Callable[..., Any]

# diffusers 0.42 hands tensors to numpy 2 in a way that torch 2.13 does not serve yet
DIFFUSERS_MEETS_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def _first_noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _ddim_trajectory(pipe: DDIMPipeline, seeds: range, num_steps: int) -> list[torch.Tensor]:
    """The inputs of the UNet, by a loop of our own."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_steps)
    x, inputs = torch.cat([_first_noise(seed) for seed in seeds]), []
    for t in scheduler.timesteps:
        inputs.append(x)
        x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    return inputs


def test_records_are_a_manual_ddim_loop_bit_for_bit(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    recorded = calibration.collect(
        tiny_pipeline, tmp_path / "set", num_inference_steps=5, num_samples=5, batch_size=3, seed=11
    )
    loops = [_ddim_trajectory(tiny_pipeline, seeds, 5) for seeds in (range(11, 14), range(14, 16))]
    for step in range(5):
        records = list(recorded.batches(step))
        assert [record.sample.shape[0] for record in records] == [3, 2]
        for record, loop in zip(records, loops, strict=True):
            assert torch.equal(record.sample, loop[step])
            assert record.cond == {}
            assert record.step == step
            assert record.timestep.item() == recorded.timesteps[step]
    assert recorded.timesteps == (800, 600, 400, 200, 0)
    assert all(type(timestep) is int for timestep in recorded.timesteps)


def test_a_trajectory_does_not_depend_on_its_batch(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "num_samples": 4, "seed": 5}
    sets = [
        calibration.collect(tiny_pipeline, tmp_path / str(size), batch_size=size, **options)
        for size in (1, 4)
    ]
    for step in range(3):
        one, four = (torch.cat([r.sample for r in recorded.batches(step)]) for recorded in sets)
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)
    first = torch.cat([record.sample for record in sets[0].batches(0)])
    assert torch.equal(first, torch.cat([_first_noise(seed) for seed in range(5, 9)]))


@DIFFUSERS_MEETS_NUMPY
@pytest.mark.parametrize(
    ("kind", "options", "calls"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}, 5),
        (HeunDiscreteScheduler, {}, 7),
        (DPMSolverMultistepScheduler, {}, 4),
    ],
)
def test_each_call_is_a_step_of_its_own(
    guided_pipeline: Guided, tmp_path: Path, kind: Any, options: dict[str, Any], calls: int
) -> None:
    scheduler = kind(**options)
    pipe = guided_pipeline(scheduler)
    scheduler.set_timesteps(4)
    expected = tuple(scheduler.timesteps.tolist())
    recorded = calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=4, num_samples=2, batch_size=2, prompts=["a", "b"]
    )
    assert recorded.num_steps == len(expected) == calls
    assert recorded.num_inference_steps == 4
    assert recorded.timesteps == expected
    samples = [next(recorded.batches(step)).sample for step in range(calls)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(samples))
    assert recorded.scheduler_config["num_train_timesteps"] == 1000
    assert recorded.scheduler_config == {
        name: value for name, value in scheduler.config.items() if not name.startswith("_")
    }


def test_guided_rows_and_conditioning_are_kept_as_passed(guided_pipeline: Guided, tmp_path: Path) -> None:
    pipe = guided_pipeline()
    seen: list[dict[str, Any]] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({"sample": args[0], **kwargs}), with_kwargs=True
    )
    recorded = calibration.collect(
        pipe,
        tmp_path / "set",
        num_inference_steps=3,
        num_samples=5,
        batch_size=3,
        prompts=(f"prompt {i}" for i in itertools.count()),
        guidance_scale=3.0,
    )
    handle.remove()
    assert recorded.rows_per_sample == 2
    assert recorded.cond_names == ("added_cond_kwargs.size", "class_labels", "encoder_hidden_states")
    for step, (batch, rows) in itertools.product(range(3), enumerate((6, 4))):
        record, call = list(recorded.batches(step))[batch], seen[3 * batch + step]
        assert record.sample.shape[0] == rows
        assert torch.equal(record.sample, call["sample"])
        arguments = calibration.nest(record.cond)
        assert torch.equal(arguments["encoder_hidden_states"], call["encoder_hidden_states"])
        assert torch.equal(arguments["class_labels"], call["class_labels"])
        assert torch.equal(arguments["added_cond_kwargs"]["size"], call["added_cond_kwargs"]["size"])


def test_inputs_carry_what_prompts_do_not(guided_pipeline: Guided, tmp_path: Path) -> None:
    labels = [torch.tensor([0, 1]), torch.tensor([3])]
    recorded = calibration.collect(
        guided_pipeline(),
        tmp_path / "set",
        num_inference_steps=2,
        num_samples=3,
        batch_size=2,
        inputs=({"class_labels": label} for label in labels),
    )
    for step in range(2):
        kept = [record.cond["class_labels"] for record in recorded.batches(step)]
        assert [label.tolist() for label in kept] == [[0, 1], [3]]


@DIFFUSERS_MEETS_NUMPY
def test_noise_that_no_generator_governs_is_seeded_too(guided_pipeline: Guided, tmp_path: Path) -> None:
    """This pipeline gives its scheduler no generator, so an ancestral one draws from torch's own state."""
    sets = []
    for name in "ab":
        pipe = guided_pipeline(EulerAncestralDiscreteScheduler())
        sets.append(
            calibration.collect(
                pipe,
                tmp_path / name,
                num_inference_steps=3,
                num_samples=1,
                batch_size=1,
                prompts=["x"],
            )
        )
        torch.rand(3)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert all(type(timestep) is float for timestep in sets[0].timesteps)


def test_no_trajectory_outlives_its_shard(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(journal: Journal, index: int, trajectory: Trajectory, **options: Any) -> Any:
        assert [ref for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(trajectory.sample))
        return write_shard(journal, index, trajectory, **options)

    monkeypatch.setattr("errata.calibration.document.write_shard", watch)
    calibration.collect(tiny_pipeline, tmp_path / "set", num_inference_steps=2, num_samples=6, batch_size=1)
    assert len(alive) == 6


def test_inputs_are_drawn_one_batch_at_a_time(guided_pipeline: Guided, tmp_path: Path) -> None:
    pipe, shards = guided_pipeline(), tmp_path / "set" / "shards"

    def draw() -> Iterator[dict[str, Any]]:
        for index in itertools.count():
            assert len(list(shards.iterdir())) == index
            yield {"class_labels": torch.tensor([index % 4])}

    calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=2, num_samples=3, batch_size=1, inputs=draw()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_left_as_it_was(guided_pipeline: Guided, tmp_path: Path, fails: bool) -> None:
    pipe = guided_pipeline(PNDMScheduler(skip_prk_steps=True))
    pipe.set_progress_bar_config(disable=True, desc="mine")
    pipe(prompt=["warm"], num_inference_steps=3)  # a scheduler in the middle of its life
    scheduler, unet = pipe.scheduler, pipe.unet
    unet.mid_block.train()
    before = dict(vars(pipe)), dict(vars(scheduler)), _state(unet), torch.get_rng_state()
    inputs: list[dict[str, Any]] = [{}, {"unguided_steps": "one"} if fails else {}]
    outcome = pytest.raises(CalibrationError, match="refused") if fails else contextlib.nullcontext()
    with outcome:
        calibration.collect(
            pipe,
            tmp_path / "set",
            num_inference_steps=2,
            num_samples=2,
            batch_size=1,
            prompts=["a", "b"],
            inputs=inputs,
            guidance_scale=2.0,
            device="cpu",
        )
    after = dict(vars(pipe)), dict(vars(scheduler)), _state(unet), torch.get_rng_state()
    unet.eval()
    assert before[0] == after[0]
    assert pipe.scheduler is scheduler
    assert before[1].keys() == after[1].keys()
    assert all(before[1][key] is after[1][key] for key in before[1])
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


def _state(unet: torch.nn.Module) -> Any:
    return [
        (
            name,
            part.training,
            sorted(vars(part)),
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            len(part._forward_pre_hooks_with_kwargs),
        )
        for name, part in unet.named_modules()
    ]


def test_dropout_is_off_while_recording(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "num_samples": 1, "batch_size": 1}
    calibration.collect(tiny_pipeline, tmp_path / "eval", **options)
    tiny_pipeline.unet.train()
    modes: list[bool] = []
    handle = tiny_pipeline.unet.register_forward_hook(lambda unet, *_: modes.append(unet.training))
    try:
        calibration.collect(tiny_pipeline, tmp_path / "train", **options)
        assert tiny_pipeline.unet.training
    finally:
        handle.remove()
        tiny_pipeline.unet.eval()
    assert modes == [False, False]
    assert _files(tmp_path / "eval") == _files(tmp_path / "train")


def test_the_progress_bar_counts_calls(
    guided_pipeline: Guided,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = guided_pipeline(PNDMScheduler(skip_prk_steps=True))
    options: dict[str, Any] = {
        "num_inference_steps": 4,
        "num_samples": 2,
        "batch_size": 1,
        "prompts": ["a", "b"],
    }
    calibration.collect(pipe, tmp_path / "redirected", **options)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for people
    calibration.collect(pipe, tmp_path / "silent", **options)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    calibration.collect(pipe, tmp_path / "set", **options)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; expected a whole number of at least 1"),
        ({"num_samples": -1}, "`num_samples` is -1; expected"),
        ({"batch_size": 2.0}, "`batch_size` is 2.0; expected"),
        ({"seed": -1}, "`seed` is -1; expected"),
        ({"device": "gpu"}, "`device` is 'gpu', which torch cannot use here; try 'cpu'"),
        ({"device": "cuda:99"}, "`device` is 'cuda:99', which torch cannot use here"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan; expected a finite number"),
        ({"guidance_scale": 2.0}, "DDIMPipeline does not take `guidance_scale`"),
        ({"prompts": ["a"]}, "DDIMPipeline does not take `prompt`"),
        ({"inputs": {"eta": 1.0}}, "`inputs` is one mapping; pass a list"),
        ({"inputs": [{"eta": 1.0}]}, "`inputs` has 1 entries, 2 are needed"),
        ({"inputs": iter([{"eta": 1.0}])}, "`inputs` has 1 entries, 2 are needed"),
        ({"inputs": [1, 2]}, "`inputs` yields 1; expected mappings"),
        ({"inputs": [{"batch_size": 3}] * 2}, "`inputs` has `batch_size`, which calibrate sets itself"),
        ({"inputs": [{"zeta": 3}] * 2}, "DDIMPipeline refused its arguments: .*zeta"),
        ({"inputs": [{"eta": object()}] * 2}, "`inputs.eta` is a object, whose content cannot be compared"),
    ],
)
def test_bad_arguments_leave_nothing_behind(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "num_samples": 2, "batch_size": 1} | options
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration.collect(tiny_pipeline, tmp_path / "set", **arguments)
    assert "\n" not in str(caught.value)
    exhausted = isinstance(options.get("inputs"), Iterator)  # its first shard is good and kept
    assert (tmp_path / "set").exists() == exhausted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "GuidedPipeline does not take `batch_size`: it needs `prompts` or `inputs`"),
        ({"prompts": "ab"}, "`prompts` is one text; pass a list"),
        ({"prompts": ["a"]}, "`prompts` has 1 entries, 2 are needed"),
        ({"prompts": ["a", 2]}, "`prompts` has 2; expected texts"),
        ({"prompts": "ab", "inputs": [{"prompt": ["a"]}] * 2}, "`prompts` is one text"),
        (
            {"prompts": ["a", "b"], "inputs": [{"prompt": ["a"]}] * 2},
            "`inputs` has `prompt`, which calibrate sets",
        ),
        (
            {"prompts": ["a", "b"], "guidance_scale": 2.0, "inputs": [{"unguided_steps": 1}] * 2},
            r"argument `sample` changed within a trajectory: call 0 got float32\[1, 1, 8, 8\], call 1 got",
        ),
        (
            {"inputs": [{"prompt": ["a", "b"]}] * 2},
            "returned 2 samples, expected 1; the mapping in `inputs` must describe exactly 1",
        ),
        (
            {"inputs": [{"prompt": ["a", "b"]}], "batch_size": 3, "num_samples": 3},
            "returned 2 samples, expected 3",
        ),
    ],
)
def test_bad_conditioning_leaves_nothing_behind(
    guided_pipeline: Guided, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "num_samples": 2, "batch_size": 1} | options
    with pytest.raises(CalibrationError, match=message):
        calibration.collect(guided_pipeline(), tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_trajectories_must_take_the_same_steps(guided_pipeline: Guided, tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match="sample-batch 1 made other UNet calls .*rows_per_sample was 2, is now 1"
    ):
        calibration.collect(
            guided_pipeline(),
            tmp_path / "set",
            num_inference_steps=2,
            num_samples=2,
            batch_size=1,
            prompts=["a", "b"],
            inputs=[{"guidance_scale": 2.0}, {"guidance_scale": 1.0}],
        )


def test_a_pipeline_without_unet_is_refused(guided_pipeline: Guided, tmp_path: Path) -> None:
    pipe = guided_pipeline()
    pipe.unet = None
    with pytest.raises(CalibrationError, match="`pipe` is a GuidedPipeline, which has no unet"):
        calibration.collect(pipe, tmp_path / "set", num_inference_steps=1, num_samples=1, batch_size=1)


def _files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_another_device_starts_from_the_same_noise_and_is_left_again(
    tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "num_samples": 2, "batch_size": 2}
    cpu = calibration.collect(tiny_pipeline, tmp_path / "cpu", **options)
    cuda = calibration.collect(tiny_pipeline, tmp_path / "cuda", device="cuda", **options)
    assert tiny_pipeline.device.type == "cpu"
    assert cuda.fingerprint == cpu.fingerprint
    assert torch.equal(next(cpu.batches(0)).sample, next(cuda.batches(0)).sample)
    torch.testing.assert_close(
        next(cpu.batches(2)).sample, next(cuda.batches(2)).sample, rtol=1e-2, atol=1e-2
    )
