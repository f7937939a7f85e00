"""Train a small noise-prediction UNet and write it as a diffusers pipeline folder.

Shared by the `train_*.py` scripts, which only choose the data and the architecture.

| symbol | name here       | meaning                                             |
|--------|-----------------|-----------------------------------------------------|
| x_0    | `images`        | clean images in [-1, 1], (B, C, H, W)               |
| t      | `timesteps`     | training time, integer in [0, 1000), (B,)           |
| eps    | `noise`         | the Gaussian noise that the network learns to name  |
| x_t    | `noisy`         | sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps             |

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1 (the simple loss).
"""

import argparse
import copy
import json
import logging
import math
import platform
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

logger = logging.getLogger(__name__)

LOSS_WINDOW = 200  # steps averaged into the reported loss

BatchSource = Callable[[int, torch.Generator], Tensor]
"""Takes a batch size and a generator, gives images (B, C, H, W), float32 in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast to train. The run ends at `steps` or `minutes`, whichever comes first.

    The learning rate follows the nearer of the two ends, so its decay always completes.
    """

    steps: int | None
    minutes: float | None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    snapshot_minutes: float | None = None
    mixed_precision: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("neither steps nor minutes is given; set at least one so that training ends")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}; it must be positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    def progress(self, step: int, seconds: float) -> float:
        """Return the fraction of the run that is over, in [0, 1]."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run measured."""

    steps: int
    images_seen: int
    loss: float
    seconds: float
    is_final: bool


def make_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Ho et al. 2020 (linear beta, 1000 steps), sampled with DDIM.

    Nothing is clipped, so that an error of the network reaches the image instead of being hidden.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
    )


def learning_rate_at(progress: float, step: int, plan: TrainingPlan) -> float:
    """Return the learning rate: linear warm-up in steps, times a cosine decay to zero in progress."""
    warmup = min(1.0, (step + 1) / max(1, plan.warmup_steps))
    return plan.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def draw_timesteps(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """Return `count` timesteps in [0, limit), int64, one from each of `count` equal strata.

    Stratifying keeps the uniform marginal and lowers the variance of the loss between batches.
    """
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (position * limit).long().clamp_(max=limit - 1)


@torch.no_grad()
def update_average_(average: UNet2DModel, unet: UNet2DModel, step: int, decay: float) -> None:
    """Move the averaged weights toward `unet` in place; the decay warms up so early noise is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    targets = list(average.parameters())
    torch._foreach_lerp_(targets, list(unet.parameters()), 1 - decay)


def noise_loss(
    model: Callable[..., Any],
    scheduler: DDIMScheduler,
    images: Tensor,
    generator: torch.Generator,
    *,
    mixed_precision: bool,
) -> Tensor:
    """Return the mean squared error of the predicted noise on one batch (a scalar, float32).

    images: (B, C, H, W), float32 in [-1, 1]. The generator lives on the CPU so that a seed means
    the same noise on every device.
    """
    noise = torch.randn(images.shape, generator=generator).to(images)
    timesteps = draw_timesteps(len(images), scheduler.config.num_train_timesteps, generator)
    timesteps = timesteps.to(images.device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=mixed_precision):
        predicted = model(noisy.contiguous(memory_format=torch.channels_last), timesteps).sample
    return F.mse_loss(predicted.float(), noise)


def train(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    draw_batch: BatchSource,
    plan: TrainingPlan,
    *,
    device: torch.device,
    save: Callable[[UNet2DModel, TrainingResult], None],
) -> TrainingResult:
    """Train `unet` in place by `plan`, and hand the averaged weights to `save`.

    `save` is called every `plan.snapshot_minutes` and once at the end.
    """
    unet.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(unet).requires_grad_(False).eval()
    model = torch.compile(unet) if plan.compile else unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=plan.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(plan.seed)
    losses: deque[Tensor] = deque(maxlen=LOSS_WINDOW)
    start = last_save = time.monotonic()
    step, progress = 0, 0.0

    def result() -> TrainingResult:
        return TrainingResult(
            steps=step,
            images_seen=step * plan.batch_size,
            loss=float(torch.stack(list(losses)).mean()),
            seconds=round(time.monotonic() - start, 1),
            is_final=progress >= 1.0,
        )

    with tqdm(total=plan.steps, unit="step", mininterval=10) as bar:
        while progress < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(progress, step, plan)
            images = draw_batch(plan.batch_size, generator).to(device)
            loss = noise_loss(model, scheduler, images, generator, mixed_precision=plan.mixed_precision)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), plan.gradient_clip)
            optimizer.step()
            update_average_(average, unet, step, plan.ema_decay)
            losses.append(loss.detach())
            step += 1
            bar.update()
            now = time.monotonic()
            progress = plan.progress(step, now - start)
            if plan.snapshot_minutes and now - last_save > 60 * plan.snapshot_minutes and progress < 1.0:
                save(average, result())
                last_save = now
                logger.info("step %d: snapshot, loss %.4f", step, result().loss)
    save(average, result())
    return result()


def continue_from_(unet: UNet2DModel, folder: Path) -> list[dict[str, Any]]:
    """Load the weights of an earlier run into `unet`, and return the list of all earlier runs.

    Only the weights continue: the optimizer, the average and the learning rate start afresh.
    """
    stored = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    unet.load_state_dict(stored.float().state_dict(), strict=True)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    kept = ("date", "command", "steps", "images_seen", "final_loss", "seconds")
    return [*record["earlier_runs"], {key: record[key] for key in kept}]


def write_pipeline(
    folder: Path,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    record: dict[str, Any],
) -> None:
    """Write a diffusers folder with half-precision safetensors weights, and `training.json`.

    Each file is replaced whole, so a reader never meets a half-written one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(unet).to("cpu", memory_format=torch.contiguous_format).half()
    half.register_to_config(_name_or_path="")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        DDIMPipeline(unet=half, scheduler=scheduler).save_pretrained(staging, safe_serialization=True)
        (staging / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = folder / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(0o644)  # safetensors writes 0600
            source.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def training_record(
    unet: UNet2DModel,
    plan: TrainingPlan,
    result: TrainingResult,
    *,
    data: dict[str, Any],
    device: torch.device,
    packages: tuple[str, ...],
    earlier: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what `training.json` holds: how these weights came to be, in plain JSON values.

    Steps, images and seconds are of this run; `earlier_runs` names those that it continued.
    """
    return {
        "status": "final" if result.is_final else "snapshot",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "data": data,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "earlier_runs": earlier,
        "steps": result.steps,
        "images_seen": result.images_seen,
        "final_loss": round(result.loss, 6),
        "final_loss_window": LOSS_WINDOW,
        "seconds": result.seconds,
        "weights": "exponential moving average, float16",
        "plan": asdict(plan),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def add_training_options(parser: argparse.ArgumentParser, *, steps: int, batch_size: int) -> None:
    """Add the options that every training script has; steps and batch_size are their defaults."""
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--continue-from", type=Path, help="pipeline folder of an earlier run")
    parser.add_argument("--steps", type=int, default=steps, help="upper bound on training steps")
    parser.add_argument("--minutes", type=float, help="upper bound on wall-clock time")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--snapshot-minutes", type=float, help="also write the folder this often")
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
) -> TrainingResult:
    """Train `unet` as the command line says and write `options.out`.

    data: what to record about the images. packages: whose versions to record.
    """
    # bfloat16 pays on every recent GPU, and on few CPUs
    mixed = device.type == "cuda" if options.mixed_precision is None else options.mixed_precision
    plan = TrainingPlan(
        steps=options.steps,
        minutes=options.minutes,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        snapshot_minutes=options.snapshot_minutes,
        mixed_precision=mixed,
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

    return train(unet, scheduler, draw_batch, plan, device=device, save=save)
