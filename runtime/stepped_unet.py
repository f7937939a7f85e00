"""The module that takes the UNet's place in a diffusers pipeline and evaluates a denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from errata.errors import ArtifactMismatchError
from errata.runtime.branches import uncompiled
from errata.runtime.copying_denoiser import owned
from errata.runtime.denoiser import Denoiser
from errata.runtime.unet import BranchedUNet
from errata.runtime.unet_arguments import is_same_timestep, read_arguments


class SteppedUNet(nn.Module):
    """Stand-in for the UNet of a diffusers pipeline that evaluates a `Denoiser`.

    It takes the arguments of the network that it stands for. `unet(x, timestep, …, step=None).sample` is a
    full call: an unknown timestep is an error; a repeated one means its first occurrence unless `step` is
    given. Inside a `Run` the calls are counted instead, and the cache schedule decides their kind.

    Floating-point inputs may have another precision than the network (a half-precision pipeline around
    float32 kernels): they are cast to the network's, and the prediction is cast back.

    Args:
        denoiser: what is evaluated; where it reuses the memory of its outputs, they are copied.
        config: the float network's configuration.
        module: the network inside, as a `BranchedUNet`; None where the denoiser has none.
        stands_for: class of the float network, whose arguments are taken; with a `module` it is that one's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: Any,
        *,
        module: BranchedUNet | None = None,
        stands_for: type[nn.Module] = UNet2DModel,
    ) -> None:
        super().__init__()
        self._denoiser = denoiser
        self.config = config
        self.module = module
        self.stands_for = stands_for if module is None else type(uncompiled(module.unet))
        self._signature = _signature(self.stands_for)
        self._observer: Callable[[Tensor, float, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def denoiser(self) -> Denoiser:
        """What is evaluated; its outputs stay as they are."""
        return owned(self._denoiser)

    @denoiser.setter
    def denoiser(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type that the network computes in."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.dtype for p in tensors if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.device for p in tensors), torch.device("cpu"))

    @property
    def add_embedding(self) -> SimpleNamespace:
        """The width of the added conditions, `.linear_1.in_features`, which pipelines of SDXL look up.

        Answered from the configuration, because a quantized layer need not have such an attribute.

        Raises:
            AttributeError: this network has none.
        """
        if getattr(self.config, "addition_embed_type", None) != "text_time":
            raise AttributeError("this UNet has no add_embedding of text and time")
        width = self.config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, step: int | None = None, **kwargs: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict for `sample` `(B, C, H, W)` at `timestep`; other arguments as in the float network.

        Raises:
            ArtifactMismatchError: the timestep was not recorded, or an argument is neither tensor nor None.
            TypeError: an argument that the float network does not take, or a missing one.
        """
        call = read_arguments(self._signature, (sample, timestep, *args), kwargs)
        inner = call if self.module is None else call.to(self.dtype)
        if self._observer is not None and step is None:
            prediction = self._observer(inner.sample, call.timestep, inner.cond)
        else:
            index = self.step_of(call.timestep) if step is None else step
            prediction, _ = self.denoiser.full(inner.sample, index, inner.cond)
        if self.module is not None:
            prediction = prediction.to(sample.dtype)
        return UNet2DOutput(sample=prediction) if call.return_dict else (prediction,)

    def step_of(self, timestep: float) -> int:
        """Return the first recorded step at that timestep.

        Raises:
            ArtifactMismatchError: no step was recorded at it.
        """
        recorded = self.denoiser.timesteps
        for step, time in enumerate(recorded):
            if is_same_timestep(timestep, time):
                return step
        shown = ", ".join(f"{value:g}" for value in recorded[:3])
        raise ArtifactMismatchError(
            f"timestep {timestep:g} was not recorded; this model has scales for {len(recorded)} "
            f"timesteps ({shown}, …); pass step=… or sample with num_inference_steps={len(recorded)}"
        )


def _signature(network: type[nn.Module]) -> inspect.Signature:
    """Return what a network of that class takes, quantized or not."""
    signature = inspect.signature(network.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
