"""Recorded denoiser inputs as a network takes them."""

from __future__ import annotations

from torch import Tensor, nn

from errata.calibration import Record


def inputs_on(unet: nn.Module, record: Record) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample and conditioning of a record, on the network's device and in its floating-point type."""
    parameter = next(unet.parameters())
    fitted = record.to(parameter.device, parameter.dtype)
    return fitted.sample, fitted.cond
