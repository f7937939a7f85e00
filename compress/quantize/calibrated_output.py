"""Calibrated output: an affine map takes up the mean error that quantization leaves in each prediction.

The numbers of a call come from recorded inputs of that call: what the float network predicts there, and what
the quantized one does, in full evaluations (see `errata.runtime.output_moments`). Cached evaluations get the
same numbers: what a cache adds to the error differs from image to image, and a map of it did harm.

Of one prediction the mean error is a few per cent of the energy of its error. But it has the same sign at
step after step and adds up, so it is judged where it adds up: by images of whole runs, from noise that the
fit did not see. Where it does not help there, the identity is stored.

Source: this project. Relatives with one factor per channel: PTQD (He et al., NeurIPS 2023). Deviation from
`errata.correct.fit_sheet`, which fits along the artifact's own corrected run: recorded inputs are those of
the float model. Images of both fits were equally near to the float model's (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import StepProgress
from errata.compress.quantize.recorded_inputs import inputs_on
from errata.compress.quantize.simulation import simulate
from errata.journal import Stage
from errata.runtime.output_map import OUTPUT_MAP, CallMaps
from errata.runtime.output_moments import OutputMoments
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

SAMPLES = 64
_BATCH_SIZE = 32


@torch.no_grad()
def fit_output_map(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    table: Mapping[str, Tensor],
    *,
    stage: Stage,
) -> dict[str, Tensor]:
    """Return `output.matrix`, `(T, C, C)`, and `output.bias`, `(T, C)`, float32.

    A call is left alone, with the identity, where fewer than four trajectories were recorded.

    Args:
        unet: the float network that the table belongs to, equalized if that was equalized.
        calibration_set: its trajectories, of which `SAMPLES` are used at most.
        scheme: what is quantized; it has an `output`.
        table: codes, scales, zero points and biases.
        stage: where the numbers of a finished call are kept, for a run that continues later.
    """
    assert scheme.output is not None
    channels = scheme.output.channels
    context = StepContext()
    original, simulated = BranchedUNet(unet), BranchedUNet(simulate(unet, scheme, table, context))
    total = calibration_set.num_steps
    maps: list[dict[str, Tensor]] = []
    lines = StepProgress("calibrated output", total)
    with tqdm(total=total, desc="calibrated output", unit="step", disable=None) as bar:
        for step in range(total):
            made: list[int] = []

            def make(step: int = step, made: list[int] = made) -> dict[str, Tensor]:
                made.append(step)
                return _map_of(step, original, simulated, context, calibration_set, channels)

            maps.append(stage(f"output.{step:04d}", make))
            bar.update()
            if bar.disable:
                lines.update(step + 1, is_resumed=not made)
    return {name: torch.stack([each[name] for each in maps]) for name in OUTPUT_MAP}


def _map_of(
    step: int,
    original: BranchedUNet,
    simulated: BranchedUNet,
    context: StepContext,
    calibration_set: CalibrationSet,
    channels: int,
) -> dict[str, Tensor]:
    """Return the matrix and the bias of a call."""
    moments, timestep = OutputMoments(1, channels), float(calibration_set.timesteps[step])
    first = 0
    for record in calibration_set.batches(step, limit=SAMPLES, batch_size=_BATCH_SIZE):
        x, cond = inputs_on(original, record)
        count = len(x) // calibration_set.rows_per_sample
        right, _ = original.full(x, timestep, cond, branch=0)
        with context.at(step, time=timestep):
            prediction, _ = simulated.full(x, timestep, cond, branch=0)
        moments.add(0, prediction, right, torch.arange(len(x)) % count + first)
        first += count
    return dict(zip(OUTPUT_MAP, moments.map_of(0), strict=True))


def identity_map(num_steps: int, channels: int) -> dict[str, Tensor]:
    """Return the numbers that change nothing."""
    maps = CallMaps.identity(num_steps, channels)
    return dict(zip(OUTPUT_MAP, (maps.matrix, maps.bias), strict=True))


def changes_nothing(numbers: Mapping[str, Tensor]) -> bool:
    """Return whether the map is the identity at every call."""
    matrix, bias = (numbers[name] for name in OUTPUT_MAP)
    return all(CallMaps(matrix=matrix, bias=bias).is_identity)
