"""How many trajectories to record, and in which batches, where nobody says: what fits the network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from errata.calibration.document import PARTIAL, Document
from errata.errors import CalibrationError
from errata.presets import find_preset

# What learned rounding takes at most, and what a GPU or a cache serves well.
MOST_SAMPLES, MOST_BATCH = 512, 64
# Held-out images of `compress`, which are drawn for as many trajectories.
FEWEST_SAMPLES = 16
# Parameters times positions of the network's input. One evaluation of a UNet takes a sixth to a thirteenth as
# many multiplications. DDPM-CIFAR10 has 3.7e10, Stable Diffusion 1.5 3.5e12: 512 samples below a product of
# 1e11, and the same work in all above it.
_WORK_OF_ALL = MOST_SAMPLES * 1e11
# Of a batch: 64 below a product of 2.5e11, 4 for Stable Diffusion 1.5.
_WORK_OF_BATCH = MOST_BATCH * 2.5e11


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers, and why they are these; `reason` is empty where both were asked for."""

    num_samples: int
    batch_size: int
    reason: str


def choose_sizes(
    unet: nn.Module,
    *,
    num_samples: int | None,
    batch_size: int | None,
    preset: str | None = None,
    out: Path | None = None,
) -> Sizes:
    """Return the numbers that were asked for; in place of None, those of unfinished work, or what fits.

    Args:
        unet: the denoiser.
        num_samples: trajectories to record.
        batch_size: samples per run of the pipeline.
        preset: a name of `errata.presets`, for smaller numbers.
        out: where the work will go, and may have begun.

    Raises:
        CalibrationError: unknown preset.
    """
    chosen = find_preset(preset, error=CalibrationError)
    if num_samples is not None and batch_size is not None:
        return Sizes(num_samples=num_samples, batch_size=batch_size, reason="")
    begun = _begun(out)
    work = _parameters(unet) * _positions(unet)
    samples = _power_of_two(_WORK_OF_ALL / work, FEWEST_SAMPLES, MOST_SAMPLES)
    batch = _power_of_two(_WORK_OF_BATCH / work, 1, MOST_BATCH)
    reason = f"chosen for a network of {_parameters(unet) / 1e6:.3g} M parameters at {_shape_text(unet)}"
    if chosen is not None:
        samples, batch = chosen.samples(samples), chosen.batch_size(batch)
        reason += f", with the preset {chosen.name}"
    if begun is not None:
        (samples, batch), reason = begun, "as the unfinished work has them"
    return Sizes(
        num_samples=samples if num_samples is None else num_samples,
        batch_size=batch if batch_size is None else batch_size,
        reason=reason,
    )


def _begun(out: Path | None) -> tuple[int, int] | None:
    """Return the numbers of unfinished work, which a run without numbers continues."""
    if out is None or not (out / PARTIAL).is_file():
        return None
    try:
        request = Document.read(out / PARTIAL).request
    except CalibrationError:  # damaged; said by whoever continues it
        return None
    return request.num_samples, request.batch_size


def _power_of_two(value: float, least: int, most: int) -> int:
    """Return the largest power of two that is not above `value`, within bounds that are powers of two."""
    whole = max(1, int(value))
    return max(least, min(most, 2 ** (whole.bit_length() - 1)))


def _parameters(unet: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in unet.parameters()))


def _shape(unet: nn.Module) -> tuple[int, ...]:
    """Return height and width of the network's usual input; one position where it does not say."""
    size = getattr(getattr(unet, "config", None), "sample_size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, list | tuple) else (1, 1)


def _positions(unet: nn.Module) -> int:
    return max(1, prod(_shape(unet)))


def _shape_text(unet: nn.Module) -> str:
    return "×".join(map(str, _shape(unet)))
