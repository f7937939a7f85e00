"""Train a small noise-prediction UNet and write it as a diffusers pipeline folder.

Shared by the `train_*.py` scripts, which only choose the data and the architecture.
"""

import argparse
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm
from training_checkpoint import TrainingState, load_checkpoint_, save_checkpoint, save_evaluations
from training_loss import held_out_loss, make_scheduler, noise_loss
from training_plan import TrainingPlan, TrainingResult, learning_rate_at
from training_record import continue_from_, training_record, write_pipeline

logger = logging.getLogger(__name__)

BatchSource = Callable[[int, torch.Generator], Tensor]
"""Takes a batch size and a generator, gives images (B, C, H, W), float32 in [-1, 1]."""


@torch.no_grad()
def update_average_(average: nn.Module, unet: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights toward `unet` in place; the decay warms up so early noise is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    targets = list(average.parameters())
    torch._foreach_lerp_(targets, list(unet.parameters()), 1 - decay)


def train(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    draw_batch: BatchSource,
    plan: TrainingPlan,
    *,
    device: torch.device,
    save: Callable[[UNet2DModel, TrainingResult], None],
    checkpoints: Path | None = None,
    held_out: Tensor | None = None,
) -> TrainingResult:
    """Train `unet` in place by `plan`, and hand the averaged weights to `save`.

    `save` is called every `plan.snapshot_minutes` and once at the end. `checkpoints` is a folder to write
    checkpoints to, and to continue from if it has one; with it, SIGTERM ends the run after the current step,
    with a checkpoint. `held_out`: images to evaluate the averaged weights on, (N, C, H, W), in [-1, 1].
    """
    state = TrainingState.start(unet, plan, device=device)
    if checkpoints is not None and load_checkpoint_(checkpoints, state, plan):
        logger.info("step %d: continues from the checkpoint in %s", state.step, checkpoints)
    model = torch.compile(unet) if plan.compile else unet
    snapshot = Timer(plan.snapshot_minutes)
    checkpoint = Timer(None if checkpoints is None else plan.checkpoint_minutes)
    with (
        stop_requests(is_heeded=checkpoints is not None) as is_asked_to_stop,
        tqdm(total=plan.steps, initial=state.step, unit="step", mininterval=10) as bar,
    ):
        while plan.progress(state.step, state.seconds) < 1.0 and not is_asked_to_stop():
            with measured_time(state):
                train_step_(model, scheduler, draw_batch, plan, state, device=device)
                if held_out is not None and state.step % plan.evaluation_steps == 0:
                    evaluate_(state, scheduler, held_out.to(device), plan, folder=checkpoints)
            bar.update()
            if snapshot.is_due():
                save(state.average, state.result(plan))
                logger.info("step %d: snapshot, loss %.4f", state.step, state.mean_loss())
            if checkpoint.is_due():
                save_checkpoint(checkpoints, state, plan)
    if checkpoints is not None:
        save_checkpoint(checkpoints, state, plan)
    save(state.average, state.result(plan))
    return state.result(plan)


def train_step_(
    model: Callable[..., Any],
    scheduler: DDIMScheduler,
    draw_batch: BatchSource,
    plan: TrainingPlan,
    state: TrainingState,
    *,
    device: torch.device,
) -> None:
    """Train on one batch. model: `state.unet`, compiled or as it is."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(plan.progress(state.step, state.seconds), state.step, plan)
    loss = noise_loss(
        model,
        scheduler,
        draw_batch(plan.batch_size, state.generator).to(device),
        state.generator,
        mixed_precision=plan.mixed_precision,
        channels_last=plan.channels_last,
    )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.unet.parameters(), plan.gradient_clip)
    state.optimizer.step()
    update_average_(state.average, state.unet, state.step, plan.ema_decay)
    state.losses.append(loss.detach())
    state.step += 1


def evaluate_(
    state: TrainingState,
    scheduler: DDIMScheduler,
    images: Tensor,
    plan: TrainingPlan,
    *,
    folder: Path | None,
) -> None:
    """Add the loss on held-out images to the state, and write the list of these losses to `folder`."""
    measured = held_out_loss(state.average, scheduler, images, mixed_precision=plan.mixed_precision)
    line = {
        "step": state.step,
        "images_seen": state.step * plan.batch_size,
        "seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "training_loss": round(state.mean_loss(), 6),
        "held_out_images": len(images),
        "held_out_loss": measured["loss"],
        "held_out_loss_by_time": measured["loss_by_time"],
    }
    state.evaluations.append(line)
    logger.info("step %d: loss %.4f, held out %.4f", state.step, state.mean_loss(), measured["loss"])
    if folder is not None:
        save_evaluations(folder, state)


class Timer:
    """Says when a number of minutes has passed since it last said so, or since it was made."""

    def __init__(self, minutes: float | None) -> None:
        """minutes: None is never."""
        self._minutes = minutes
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the time has passed, and if so start anew."""
        now = time.monotonic()
        if self._minutes is None or now - self._last <= 60 * self._minutes:
            return False
        self._last = now
        return True


@contextmanager
def measured_time(state: TrainingState) -> Iterator[None]:
    """Add the time of the block to the training time of `state`."""
    start, cpu_start = time.monotonic(), time.process_time()
    yield
    state.seconds += time.monotonic() - start
    state.cpu_seconds += time.process_time() - cpu_start


@contextmanager
def stop_requests(*, is_heeded: bool) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM has arrived, which does not end the process here.

    is_heeded: False leaves SIGTERM as it is, and the function returns False.
    """
    arrived: list[int] = []
    if not is_heeded:
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGTERM, previous)


def add_training_options(parser: argparse.ArgumentParser, *, steps: int | None, batch_size: int) -> None:
    """Add the options that every training script has; steps and batch_size are their defaults."""
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--continue-from", type=Path, help="pipeline folder of an earlier run")
    parser.add_argument("--steps", type=int, default=steps, help="upper bound on training steps")
    parser.add_argument("--minutes", type=float, help="upper bound on training time, over all resumed runs")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--snapshot-minutes", type=float, help="also write the folder this often")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder of checkpoints; the same command continues from there"
    )
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=10.0, help="write a checkpoint this often"
    )
    parser.add_argument("--ema-decay", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format; --no-channels-last was faster in bfloat16 on a CPU",
    )
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 on a busy machine")
    parser.add_argument("--seed", type=int, default=0)


def run_training(
    options: argparse.Namespace,
    unet: UNet2DModel,
    draw_batch: BatchSource,
    *,
    data: dict[str, Any],
    device: torch.device,
    packages: tuple[str, ...],
    held_out: Tensor | None = None,
    evaluation_steps: int = 300,
) -> TrainingResult:
    """Train `unet` as the command line says and write `options.out`.

    data: what to record about the images. packages: whose versions to record. held_out: images to evaluate
    on every `evaluation_steps`, (N, C, H, W), float32 in [-1, 1].
    """
    # bfloat16 pays on every recent GPU, and on few CPUs: those with instructions for it
    mixed = device.type == "cuda" if options.mixed_precision is None else options.mixed_precision
    plan = TrainingPlan(
        steps=options.steps,
        minutes=options.minutes,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        snapshot_minutes=options.snapshot_minutes,
        checkpoint_minutes=options.checkpoint_minutes,
        evaluation_steps=evaluation_steps,
        ema_decay=options.ema_decay,
        mixed_precision=mixed,
        channels_last=options.channels_last,
        compile=options.compile,
        seed=options.seed,
    )
    scheduler = make_scheduler()
    earlier = continue_from_(unet, options.continue_from) if options.continue_from else []

    def save(average: UNet2DModel, result: TrainingResult) -> None:
        record = training_record(
            average, plan, result, data=data, device=device, packages=packages, earlier=earlier
        )
        write_pipeline(options.out, average, scheduler, record)

    return train(
        unet,
        scheduler,
        draw_batch,
        plan,
        device=device,
        save=save,
        checkpoints=options.checkpoints,
        held_out=held_out,
    )
