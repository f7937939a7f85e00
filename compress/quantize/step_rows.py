"""Which recorded trajectories the ranges of a step are chosen on."""

from __future__ import annotations

from dataclasses import dataclass

from errata.calibration import CalibrationSet

# Of more steps than these, neighbours are so near to each other that their ranges come from common inputs.
DISTINCT_STEPS = 25
# The last part of sampling, where ranges change within a few steps.
LAST_PART = 1 / 8


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The trajectories that are run at each step, and the steps whose inputs a range sees.

    With fewer than two times `DISTINCT_STEPS` steps, each step runs all trajectories, and its ranges come
    from them alone. With more, the trajectories are split into groups, and neighbouring steps run different
    groups in turn. The ranges of a step come from its own group and those of the steps around it: nearly all
    trajectories, over about a twenty-fifth of the sampling time. The steps of the last eighth run all of them
    and stand alone again: inputs of other steps made the error of the prediction there up to 16 % larger
    (embedded model, 100 steps).

    Attributes:
        samples: trajectories in all.
        num_steps: recorded denoiser calls.
        calls_per_step: denoiser calls of a sampler step; calls of different kinds are never mixed.
    """

    samples: int
    num_steps: int
    calls_per_step: int = 1

    @classmethod
    def of(cls, calibration_set: CalibrationSet, *, samples_per_step: int) -> StepRows:
        """Return the choice for a calibration set; `samples_per_step` is the most a range may see."""
        return cls(
            samples=min(samples_per_step, calibration_set.num_samples),
            num_steps=calibration_set.num_steps,
            calls_per_step=calibration_set.calls_per_step,
        )

    @property
    def groups(self) -> int:
        """How many groups the trajectories are in."""
        steps = self.num_steps // self.calls_per_step
        return max(1, min(steps // DISTINCT_STEPS, self.samples))

    def samples_at(self, step: int) -> range:
        """Return the trajectories that are run at a step."""
        if self._stands_alone(step):
            return range(self.samples)
        group = step // self.calls_per_step % self.groups
        return range(group * self.samples // self.groups, (group + 1) * self.samples // self.groups)

    def around(self, step: int) -> tuple[int, ...]:
        """Return the steps whose inputs the ranges of a step come from, ascending."""
        if self._stands_alone(step):
            return (step,)
        reach = self.groups // 2
        near = (step + self.calls_per_step * offset for offset in range(-reach, reach + 1))
        return tuple(other for other in near if other >= 0 and not self._stands_alone(other))

    def _stands_alone(self, step: int) -> bool:
        return self.groups == 1 or step >= (1 - LAST_PART) * self.num_steps
