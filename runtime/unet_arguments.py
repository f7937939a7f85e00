"""The arguments of a diffusers UNet: what a pipeline passes, as one sample, one timestep and flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ArtifactMismatchError, CalibrationError
from errata.runtime.conditioning import flatten
from errata.runtime.sampler import is_same_timestep as is_same_timestep


@dataclass(frozen=True)
class UNetArguments:
    """One call of a UNet.

    `sample` is `(B, C, H, W)`, `cond` has every other tensor by the path that leads to it, such as
    `added_cond_kwargs.text_embeds`.
    """

    sample: Tensor
    timestep: float
    cond: Mapping[str, Tensor]
    return_dict: bool

    def to(self, dtype: torch.dtype) -> UNetArguments:
        """Return the same with all floating-point tensors of that type."""
        cond = {name: _cast(value, dtype) for name, value in self.cond.items()}
        return UNetArguments(_cast(self.sample, dtype), self.timestep, cond, self.return_dict)


def read_arguments(
    signature: inspect.Signature, positional: Sequence[Any], named: Mapping[str, Any]
) -> UNetArguments:
    """Read a call as the float network, whose forward has that signature (without `self`), would.

    Raises:
        TypeError: an unknown, repeated or missing argument.
        ArtifactMismatchError: an argument holds something that is not a tensor (as in
            `cross_attention_kwargs`), or the rows are at different timesteps.
    """
    try:
        arguments = dict(signature.bind(*positional, **named).arguments)
    except TypeError as error:
        allowed = ", ".join(signature.parameters)
        raise TypeError(f"the compressed UNet takes {allowed} and step: {error}") from error
    sample, timestep = arguments.pop("sample"), one_timestep(arguments.pop("timestep"))
    return_dict = bool(arguments.pop("return_dict", True))
    try:
        cond = flatten(arguments)
    except CalibrationError as error:
        raise ArtifactMismatchError(f"a compressed UNet is conditioned on tensors only: {error}") from error
    return UNetArguments(sample, timestep, cond, return_dict)


def one_timestep(timestep: Tensor | float) -> float:
    """Return the timestep that all rows share; pipelines pass a number, a scalar, or one for each row.

    Raises:
        ArtifactMismatchError: they differ.
    """
    times = torch.as_tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None).flatten()
    if len(times) == 0 or not bool((times == times[0]).all()):
        raise ArtifactMismatchError(
            f"the rows of a batch are at different timesteps ({times.tolist()[:3]}, …); activation scales "
            "are one per step, so call once for each timestep"
        )
    return float(times[0])


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
