"""The state of a training run, and checkpoints from which it continues as if it had never stopped.

A checkpoint is one safetensors file: weights, averaged weights, optimizer, random states and recent losses
as tensors, the rest as JSON under `training` in the file's metadata. It is replaced in one rename, so there
is a complete one at any time. Losses on held-out images are also in `evaluation.jsonl`, one line each.
"""

import copy
import json
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from training_plan import TrainingPlan, TrainingResult

from errata.directories import whole_file, write_whole
from errata.errors import ErrataError

LOSS_WINDOW = 200  # steps averaged into the reported loss
CHECKPOINT = "checkpoint.safetensors"
EVALUATIONS = "evaluation.jsonl"
FORMAT = 1
ADVICE = "free some space, and run the same command again"
# How long a run is, and what it does beside training, may change when it is resumed.
MAY_CHANGE = ("steps", "minutes", "snapshot_minutes", "checkpoint_minutes", "evaluation_steps", "compile")


@dataclass(kw_only=True)
class TrainingState:
    """Everything that changes while training."""

    unet: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    losses: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, unet: nn.Module, plan: TrainingPlan, *, device: torch.device) -> "TrainingState":
        """Return the state before the first step. Move `unet` to the device, to be trained in place."""
        unet.to(device)
        if plan.channels_last:
            unet.to(memory_format=torch.channels_last)
        unet.train()
        return cls(
            unet=unet,
            average=copy.deepcopy(unet).requires_grad_(False).eval(),
            optimizer=torch.optim.AdamW(unet.parameters(), lr=plan.learning_rate, weight_decay=0.01),
            generator=torch.Generator().manual_seed(plan.seed),
        )

    def mean_loss(self) -> float:
        """Return the training loss, averaged over the last steps."""
        return float(torch.stack(list(self.losses)).mean())

    def result(self, plan: TrainingPlan) -> TrainingResult:
        """Return what has been measured up to now."""
        return TrainingResult(
            steps=self.step,
            images_seen=self.step * plan.batch_size,
            loss=self.mean_loss(),
            seconds=round(self.seconds, 3),
            is_final=plan.progress(self.step, self.seconds) >= 1.0,
            cpu_seconds=round(self.cpu_seconds, 3),
            evaluations=tuple(self.evaluations),
        )


def save_checkpoint(folder: Path, state: TrainingState, plan: TrainingPlan) -> None:
    """Replace the checkpoint of the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "plan": asdict(plan),
        "step": state.step,
        "seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "evaluations": state.evaluations,
    }
    staging = folder / f"{CHECKPOINT}.partial"
    with whole_file(folder / CHECKPOINT, error=ErrataError, advice=ADVICE, staging=staging) as partial:
        save_file(_tensors(state), partial, metadata={"training": json.dumps(record)})
        partial.chmod(0o644)  # safetensors writes 0600


def save_evaluations(folder: Path, state: TrainingState) -> None:
    """Replace the file of evaluations, whose lines are those of `state`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in state.evaluations)
    write_whole(folder / EVALUATIONS, lines.encode(), error=ErrataError, advice=ADVICE)


def load_checkpoint_(folder: Path, state: TrainingState, plan: TrainingPlan) -> bool:
    """Bring `state` to where the folder's checkpoint was written, and return whether there is one.

    Raises:
        ValueError: the checkpoint has another format, or comes from a run with other options.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["training"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check(record, plan, path)
    state.unet.load_state_dict(_under("weights.", tensors), strict=True)
    state.average.load_state_dict(_under("average.", tensors), strict=True)
    _load_optimizer_(state.optimizer, _under("optimizer.", tensors))
    state.generator.set_state(tensors["random.batches"])
    torch.set_rng_state(tensors["random.default"])
    state.losses.extend(tensors["losses"].unbind())
    state.step, state.evaluations = record["step"], record["evaluations"]
    state.seconds, state.cpu_seconds = record["seconds"], record["cpu_seconds"]
    return True


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {f"weights.{name}": value for name, value in state.unet.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    tensors["random.batches"] = state.generator.get_state()
    tensors["random.default"] = torch.get_rng_state()
    tensors["losses"] = torch.stack(list(state.losses)).cpu()
    return {name: value.contiguous() for name, value in tensors.items()}


def _load_optimizer_(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    loaded: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        loaded.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": loaded})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check(record: dict[str, Any], plan: TrainingPlan, path: Path) -> None:
    if record["format"] != FORMAT:
        raise ValueError(f"`{path}` has format {record['format']}; this script reads format {FORMAT}")
    stored, wanted = record["plan"], asdict(plan)
    for name in wanted.keys() - set(MAY_CHANGE):
        if stored[name] != wanted[name]:
            raise ValueError(
                f"`{path}` comes from a run with {name} {stored[name]}, and {name} is now {wanted[name]}; "
                "repeat the options of that run, or give another folder as --checkpoints"
            )
