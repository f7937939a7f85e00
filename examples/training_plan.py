"""How long and how fast a training run goes, and what it measured."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast to train. The run ends at `steps` or `minutes`, whichever comes first.

    The learning rate follows the nearer of the two ends, so its decay always completes. A resumed run
    counts the steps and minutes of the runs before it.
    """

    steps: int | None
    minutes: float | None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    snapshot_minutes: float | None = None
    checkpoint_minutes: float = 10.0
    evaluation_steps: int = 300
    mixed_precision: bool = False
    channels_last: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("neither steps nor minutes is given; set at least one so that training ends")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        for name in ("minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        for name in ("batch_size", "evaluation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def progress(self, step: int, seconds: float) -> float:
        """Return the fraction of the run that is over, in [0, 1]."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run measured, together with the runs that it resumed.

    `seconds` is wall-clock time and `cpu_seconds` the processor time of all threads.
    """

    steps: int
    images_seen: int
    loss: float
    seconds: float
    is_final: bool
    cpu_seconds: float = 0.0
    evaluations: tuple[dict[str, Any], ...] = ()


def learning_rate_at(progress: float, step: int, plan: TrainingPlan) -> float:
    """Return the learning rate: linear warm-up in steps, times a cosine decay to zero in progress."""
    warmup = min(1.0, (step + 1) / max(1, plan.warmup_steps))
    return plan.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))
