"""The training scripts on a tiny network: a resumed run is an unbroken one, and evaluation is repeatable."""

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from errata.errors import ErrataError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODULES = ("training", "training_checkpoint", "training_loss", "training_plan", "training_record")
STEPS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of `examples`, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )


def images(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1


def stopped_after(calls: int) -> Callable[[int, torch.Generator], Tensor]:
    """Images, and the signal of `kill` while the last of the calls is served."""
    served = []

    def draw_batch(count: int, generator: torch.Generator) -> Tensor:
        served.append(count)
        if len(served) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return images(count, generator)

    return draw_batch


def run(scripts: SimpleNamespace, draw_batch: Any = images, **options: Any) -> tuple[UNet2DModel, Any, Any]:
    """The trained network, its average and the result, of a plan of six steps."""
    changes = options.pop("plan", {})
    plan = scripts.training_plan.TrainingPlan(
        **{"steps": STEPS, "minutes": None, "batch_size": 4, "warmup_steps": 2, "evaluation_steps": 2}
        | changes
    )
    saved: list[Any] = []
    unet = tiny_unet()
    scheduler = scripts.training_loss.make_scheduler()
    result = scripts.training.train(
        unet, scheduler, draw_batch, plan, device=CPU, save=lambda *args: saved.append(args), **options
    )
    return unet, saved[-1][0], result


def losses(result: Any) -> list[tuple[int, float, float]]:
    return [(line["step"], line["training_loss"], line["held_out_loss"]) for line in result.evaluations]


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    for name, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_resumed_run_ends_as_an_unbroken_one(
    scripts: SimpleNamespace, tmp_path: Path, channels_last: bool
) -> None:
    held_out = images(8, torch.Generator().manual_seed(1))
    plan = {"channels_last": channels_last}
    unbroken = run(scripts, held_out=held_out, plan=plan)
    first = run(scripts, stopped_after(3), checkpoints=tmp_path, held_out=held_out, plan=plan)
    assert first[2].steps == 3
    assert not first[2].is_final
    torch.manual_seed(99)
    second = run(scripts, checkpoints=tmp_path, held_out=held_out, plan=plan)

    assert second[2].steps == STEPS
    assert second[2].is_final
    assert second[2].loss == unbroken[2].loss
    assert second[2].seconds > first[2].seconds
    assert_same_weights(second[0], unbroken[0])
    assert_same_weights(second[1], unbroken[1])
    assert losses(second[2]) == losses(unbroken[2])
    assert [step for step, *_ in losses(second[2])] == [2, 4, 6]


def test_evaluations_stand_beside_the_checkpoint(scripts: SimpleNamespace, tmp_path: Path) -> None:
    held_out = images(8, torch.Generator().manual_seed(1))
    *_, result = run(scripts, checkpoints=tmp_path, held_out=held_out)
    lines = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(result.evaluations)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "evaluation.jsonl"]


def test_a_finished_run_is_not_trained_further(scripts: SimpleNamespace, tmp_path: Path) -> None:
    unet, _, _ = run(scripts, checkpoints=tmp_path)
    again, _, result = run(scripts, checkpoints=tmp_path)
    assert result.steps == STEPS
    assert_same_weights(again, unet)


def test_a_checkpoint_of_other_options_is_refused(scripts: SimpleNamespace, tmp_path: Path) -> None:
    run(scripts, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="batch_size 4, and batch_size is now 8; repeat the options"):
        run(scripts, checkpoints=tmp_path, plan={"batch_size": 8})
    *_, longer = run(scripts, checkpoints=tmp_path, plan={"steps": STEPS + 1})
    assert longer.steps == STEPS + 1


def test_a_failed_write_leaves_the_last_checkpoint(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(scripts, checkpoints=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def break_off(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(scripts.training_checkpoint, "save_file", break_off)
    with pytest.raises(ErrataError, match=r"cannot write `.*checkpoint.safetensors`: disk full; free some"):
        run(scripts, checkpoints=tmp_path, plan={"steps": STEPS + 1})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not (tmp_path / "checkpoint.safetensors.partial").exists()


def test_sigterm_is_restored_after_a_run(scripts: SimpleNamespace, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(scripts, checkpoints=tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_held_out_loss_is_that_of_one_noise_and_one_set_of_timesteps(scripts: SimpleNamespace) -> None:
    loss = scripts.training_loss
    scheduler, unet = loss.make_scheduler(), tiny_unet().eval()
    held_out = images(8, torch.Generator().manual_seed(1))
    first = loss.held_out_loss(unet, scheduler, held_out, mixed_precision=False)
    torch.manual_seed(99)
    assert loss.held_out_loss(unet, scheduler, held_out, mixed_precision=False) == first
    assert sum(first["loss_by_time"]) / 4 == pytest.approx(first["loss"], rel=1e-5)

    zero = loss.held_out_loss(
        lambda noisy, timesteps: SimpleNamespace(sample=torch.zeros_like(noisy)),
        scheduler,
        held_out,
        mixed_precision=False,
    )
    generator = torch.Generator().manual_seed(loss.EVALUATION_SEED)
    loss.draw_timesteps(8, 1000, generator)
    noise = torch.randn(held_out.shape, generator=generator)
    assert zero["loss"] == pytest.approx(float(noise.square().mean()), abs=1e-6)


def test_the_cifar_network_has_the_size_that_is_told(scripts: SimpleNamespace) -> None:
    unet = importlib.import_module("train_cifar10").make_unet()
    assert 6.0e6 < sum(parameter.numel() for parameter in unet.parameters()) < 6.15e6
