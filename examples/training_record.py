"""The pipeline folder that a run writes: weights, and `training.json`, which says how they came to be."""

import copy
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from training_checkpoint import ADVICE, LOSS_WINDOW
from training_plan import TrainingPlan, TrainingResult

from errata.directories import whole_file
from errata.errors import ErrataError


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
            with whole_file(target, error=ErrataError, advice=ADVICE) as partial:
                shutil.move(source, partial)
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

    Steps, images and seconds are of this run, from its first step on, however often it was resumed;
    `earlier_runs` names those whose weights it started from.
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
        "cpu_seconds": result.cpu_seconds,
        "evaluations": list(result.evaluations),
        "weights": "exponential moving average, float16",
        "plan": asdict(plan),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
