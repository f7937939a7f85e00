"""A diffusers UNet evaluated in full, keeping a feature, or from a kept feature by its shallow branch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import RecipeError
from errata.runtime.branches import kept_input, shallow_view
from errata.runtime.conditioning import nest
from errata.runtime.structure import UpResnet, check_supported, cut_at, is_cacheable, up_resnets

_ADAPTER = "down_intrablock_additional_residuals"
_CONTROL = "mid_block_additional_residual"


class BranchedUNet(nn.Module):
    """A diffusers UNet with a cut somewhere in its up path.

    With `branch = b`, the feature is the hidden state that enters the last `b` resnets of the up path, over
    all its blocks. A cached call recomputes only what those resnets need: the embeddings, `conv_in`, the
    down-block layers whose outputs are their `b` skip inputs, the resnets with what follows them, and the
    output.

    Both kinds of call run the wrapped model's own forward, so `full` equals it bit for bit. The wrapped model
    is never changed; a cached call runs a view that shares its modules (see `branches`).

    Source: DeepCache (Ma et al., CVPR 2024), section 3; its CIFAR-10 setting is the last 3 resnets.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        check_supported(unet)
        self.unet: Any = unet
        self._required = _required_arguments(unet)
        self._cuts = up_resnets(unet) if is_cacheable(unet) else ()

    @property
    def max_branch(self) -> int:
        """How many resnets the up path has, the largest branch; 0 where features cannot be cached."""
        return len(self._cuts)

    @property
    def runs_programs(self) -> bool:
        """Whether calls run as programs that were recorded, see `plan`."""
        return False

    def plan(self) -> str:
        """Return how whole calls are made, and why; empty where there is but one way."""
        return ""

    def full(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], *, branch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction `(B, C, H, W)` and, for `branch > 0`, the feature `(B, F, H', W')`.

        Args:
            x: `(B, C, H, W)`.
            timestep: one for all rows, or `(B,)`, one for each.
            cond: the forward's other arguments, as recorded: flat names such as
                `added_cond_kwargs.text_embeds`.
            branch: where the feature is taken; 0 keeps none.

        Raises:
            RecipeError: features of this UNet cannot be cached, or not there.
            RuntimeError: the network was compiled in a call that keeps no feature, and ignores those that do.
        """
        times, arguments = times_of(x, timestep), self._arguments(cond)
        if branch == 0:
            return self.unet(x, times, **arguments)[0], None
        cut = self._cut(branch)
        with kept_input(self.unet.get_submodule(cut.name), channels=cut.hidden_channels) as kept:
            prediction: Tensor = self.unet(x, times, **arguments)[0]
        if not kept:  # torch 2.13 does not look for new hooks when it takes what it has compiled
            raise RuntimeError(
                f"`{cut.name}` kept no feature: torch.compile compiled it in a call that keeps none, and "
                "took that for this one; set torch._dynamo.config.skip_nnmodule_hook_guards = False, then "
                "torch._dynamo.reset()"
            )
        return prediction, kept[0]

    def cached(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], feature: Tensor, *, branch: int
    ) -> Tensor:
        """Return the prediction `(B, C, H, W)` from the kept feature and the shallow branch, see `full`.

        Raises:
            RecipeError: features of this UNet cannot be cached, or not there; or a T2I adapter takes part.
            ValueError: the feature was taken elsewhere.
        """
        cut, arguments = self._cut(branch), self._arguments(cond)
        if feature.shape[:2] != (x.shape[0], cut.hidden_channels):
            raise ValueError(
                f"the feature has shape {list(feature.shape)}; branch={branch} at a batch of {x.shape[0]} "
                f"reads [{x.shape[0]}, {cut.hidden_channels}, …]: "
                "store and read it with the same branch and batch"
            )
        if _ADAPTER in arguments:
            raise RecipeError(
                f"`{_ADAPTER}` (a T2I adapter) changes what a cache keeps; choose a recipe without a cache"
            )
        if _CONTROL in arguments:
            arguments[_CONTROL] = x.new_zeros(())  # the feature has it already
        view = shallow_view(self.unet, feature, branch=branch)
        prediction: Tensor = view(x, times_of(x, timestep), **arguments)[0]
        return prediction

    def _cut(self, branch: int) -> UpResnet:
        # Looked up once: walking through the blocks takes as long as a small layer.
        return self._cuts[-branch] if 1 <= branch <= len(self._cuts) else cut_at(self.unet, branch)

    def _arguments(self, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the forward's keyword arguments. None was not recorded, so a required one may be missing."""
        arguments = {**dict.fromkeys(self._required), **nest(cond), "return_dict": False}
        if _ADAPTER in arguments:
            arguments[_ADAPTER] = list(arguments[_ADAPTER])  # the forward takes items out of it
        return arguments


def in_evaluation(unet: nn.Module) -> nn.Module:
    """Return the network as `collect` ran it: itself in evaluation mode, else a copy in that mode."""
    is_training = any(part.training for part in unet.modules())
    return copy.deepcopy(unet).eval() if is_training else unet


def _required_arguments(unet: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(type(unet).forward).parameters.values())
    return tuple(item.name for item in parameters[3:] if item.default is item.empty)


def times_of(x: Tensor, timestep: float | Tensor) -> Tensor:
    """Return one timestep for each row, `(B,)`, of the type that a scheduler would pass."""
    if isinstance(timestep, Tensor):
        return timestep.to(x.device).expand(x.shape[0])
    value = float(timestep)
    dtype = torch.float32
    if value.is_integer():
        dtype = torch.int64
    elif torch.tensor(value, dtype=torch.float32).item() != value:
        dtype = torch.float64
    return torch.full((x.shape[0],), value, device=x.device, dtype=dtype)
