"""Activation ranges of every quantizer at every step, from recorded trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import StepProgress
from errata.compress.quantize.observed_network import observed_copy, observing_dtype, watching
from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP, inputs_on
from errata.compress.quantize.step_sketch import StepSketch
from errata.errors import RecipeError
from errata.journal import Stage, without_journal
from errata.runtime.scheme import Scheme, Site, sites_of
from errata.runtime.unet import BranchedUNet

# Rows of a batch times their height and width. More rows do not run faster, and a batch of pictures
# of 1024 pixels has to fit.
_POSITIONS = 32 * 32 * 32
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


def observe_ranges(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    *,
    steps: Sequence[int] | None = None,
    samples_per_step: int = SAMPLES_PER_STEP,
    stage: Stage = without_journal,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `(scale, zero_point)`, each `(T,)`, of every site, from full passes of the float UNet.

    Every step is observed in full, also those that a cache schedule will skip: correctors run full passes
    anywhere. `unet` itself is left alone. Which trajectories a step runs is up to `StepRows`. Memory: a copy
    of the network, in bfloat16 where that is fast; what is kept grows with the number of layers, not of
    trajectories, and no attention's probabilities are held whole.

    Args:
        unet: the float network.
        calibration_set: its trajectories.
        scheme: what is quantized.
        steps: the steps to observe, one entry of the result for each; None means all.
        samples_per_step: trajectories that a range is chosen on, at most.
        stage: where the ranges of a finished step are kept, for a run that continues later.

    Raises:
        RecipeError: a quantizer's input is not finite, or its layer does not run.
    """
    sites = sites_of(scheme)
    if not sites:
        return {}
    chosen = range(calibration_set.num_steps) if steps is None else steps
    total = len(chosen)
    observer = _Observer(unet, calibration_set, scheme, samples_per_step)
    columns: list[dict[str, Tensor]] = []
    lines = StepProgress("activation ranges", total)
    # None: not without a terminal
    with tqdm(total=total, desc="activation ranges", unit="step", disable=None) as bar:
        for done, step in enumerate(chosen, start=1):
            made: list[int] = []

            def make(step: int = step, made: list[int] = made) -> dict[str, Tensor]:
                made.append(step)
                return _ranges_at(step, observer.around(step), sites)

            columns.append(stage(f"ranges.{step:04d}", make))
            bar.update()
            if bar.disable:
                lines.update(done, is_resumed=not made)
    return {
        site.name: (
            torch.stack([column[f"{site.name}.scale"] for column in columns]),
            torch.stack([column[f"{site.name}.zero_point"] for column in columns]),
        )
        for site in sites
    }


def _ranges_at(step: int, sketch: StepSketch, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Return `<site>.scale` and `<site>.zero_point`, scalars."""
    ranges: dict[str, Tensor] = {}
    order = {name: place for place, name in enumerate(sketch.sites)}
    # As the network runs them, so that the first to see a NaN is the one to be named.
    for site in sorted(sites, key=lambda site: order.get(site.name, len(order))):
        try:
            scale, zero_point = sketch.choose_range(site.name, bits=site.bits, from_zero=site.from_zero)
        except ValueError as problem:
            raise RecipeError(
                f"no range can be chosen for {site.name!r} at step {step}: {problem}; keep its layer in "
                "floating point (modules_to_not_convert, --keep), or check the model"
            ) from problem
        ranges |= {f"{site.name}.scale": scale, f"{site.name}.zero_point": zero_point}
    return ranges


class _Observer:
    """Runs a network at single steps, and keeps the sketches of those whose neighbours still need them."""

    def __init__(
        self, unet: nn.Module, calibration_set: CalibrationSet, scheme: Scheme, samples_per_step: int
    ) -> None:
        self._unet, self._set, self._scheme = unet, calibration_set, scheme
        self._rows = StepRows.of(calibration_set, samples_per_step=samples_per_step)
        self._observed: nn.Module | None = None
        self._sketches: dict[int, StepSketch] = {}

    def around(self, step: int) -> StepSketch:
        """Return what the quantizers read at a step and at those around it."""
        needed = self._rows.around(step)
        self._sketches = {near: self._sketches[near] for near in self._sketches if near >= min(needed)}
        for near in needed:
            if near not in self._sketches:
                self._sketches[near] = _observe_step(self._network, self._set, self._scheme, near, self._rows)
        if len(needed) == 1:
            return self._sketches.pop(step)
        return StepSketch.together(self._sketches[near] for near in needed)

    @property
    def _network(self) -> nn.Module:
        """The copy to run, made when it is first needed: a run that only continues may need none."""
        if self._observed is None:
            self._observed = observed_copy(self._unet, observing_dtype(self._unet))
        return self._observed


@torch.no_grad()
def _observe_step(
    unet: nn.Module, calibration_set: CalibrationSet, scheme: Scheme, step: int, rows: StepRows
) -> StepSketch:
    sketch, samples = StepSketch(samples=rows.samples), rows.samples_at(step)
    model = BranchedUNet(unet)
    timestep = float(calibration_set.timesteps[step])
    positions = (
        calibration_set.rows_per_sample * calibration_set.sample_shape[-1] * calibration_set.sample_shape[-2]
    )
    batch_size = max(1, _POSITIONS // positions)
    with watching(unet, scheme, sketch):
        for record in calibration_set.batches(
            step, start=samples.start, limit=len(samples), batch_size=batch_size
        ):
            x, cond = inputs_on(unet, record)
            x = x.contiguous(memory_format=torch.channels_last)
            sketch.expect(len(x) // calibration_set.rows_per_sample)
            model.full(x, timestep, cond, branch=0)
    return sketch
