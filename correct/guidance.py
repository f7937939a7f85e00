"""How a pipeline gets from the network's raw output to the prediction that it hands to the scheduler."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from errata.compress.network.run import UNetCall
from errata.correct.corrector import Rows
from errata.errors import PlanError


class Guidance(Protocol):
    """The two maps between the network's batch and the samples' batch."""

    def combine(self, raw: Tensor) -> Tensor:
        """The guided prediction `(B, …)` of the network's output."""

    def expand(self, sample: Tensor) -> Tensor:
        """The network's input for scaled samples `(B, …)`."""

    def rows(self, rows: Rows, batch_size: int) -> Rows:
        """The network's rows that belong to these samples of a batch."""


class Unguided:
    """Both maps are the identity."""

    def combine(self, raw: Tensor) -> Tensor:
        """See `Guidance.combine`."""
        return raw

    def expand(self, sample: Tensor) -> Tensor:
        """See `Guidance.expand`."""
        return sample

    def rows(self, rows: Rows, batch_size: int) -> Rows:
        """See `Guidance.rows`."""
        return rows


def recognise(
    call: UNetCall, model_output: Tensor, scaled_sample: Tensor, *, compares_values: bool = True
) -> Guidance:
    """The guidance that reproduces what the pipeline did between the network and the scheduler.

    `model_output` and `scaled_sample` are what the scheduler was given and what it makes of its sample.
    Shapes are always compared. Comparing values waits for the device, unless it is the very same tensor.

    Raises:
        PlanError: no known guidance does.
    """
    if call.prediction.shape != model_output.shape or model_output.shape != scaled_sample.shape:
        raise PlanError(
            f"step {call.step}: the network returned {_shape(call.prediction)}, the scheduler was given "
            f"{_shape(model_output)} for a sample {_shape(scaled_sample)}; guidance and learned variances "
            'cannot be corrected yet: sample without guidance, or with steps="none"'
        )
    if call.prediction.dtype != model_output.dtype:
        raise PlanError(
            f"step {call.step}: the pipeline samples in {_type(model_output)}, the network computes in "
            f"{_type(call.prediction)}; only one type can be corrected yet: deployed.pipe.to(torch.float32), "
            'or sample with steps="none"'
        )
    if compares_values and not _same(call.prediction, model_output):
        raise PlanError(
            f"step {call.step}: the pipeline changed the network's prediction before it stepped; only "
            'unguided pipelines can be corrected yet: sample without guidance, or with steps="none"'
        )
    if compares_values and not _same(call.sample, scaled_sample):
        raise PlanError(
            f"step {call.step}: the network's input is not the scheduler's sample, scaled by it; such a "
            'pipeline cannot be corrected: sample with steps="none"'
        )
    return Unguided()


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)
