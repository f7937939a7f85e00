"""One small network of each kind of UNet, with arguments as a pipeline would pass them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from errata.calibration import nest


@dataclass(frozen=True)
class Case:
    """A network, normalised to predictions of about unit size, and the arguments of one call."""

    unet: Any
    x: Tensor
    time: float
    cond: dict[str, Tensor]

    def own_forward(self, **changes: Any) -> Tensor:
        """What the network itself predicts; `x`, `time` or `cond` may be others."""
        x, time = changes.get("x", self.x), changes.get("time", self.time)
        cond = changes.get("cond", self.cond)
        with torch.no_grad():
            output: Tensor = self.unet(x, torch.as_tensor(time), **nest(cond)).sample
        return output

    @property
    def num_up_resnets(self) -> int:
        return sum(len(block.resnets) for block in self.unet.up_blocks)


CACHEABLE = ("pixel", "labels", "resnet", "sd", "nomid", "sdxl", "upscaler", "audioldm2")
ALL = (*CACHEABLE, "k")


@pytest.fixture(scope="session")
def network() -> Callable[[str], Case]:
    """`network("sdxl")`: made once a session; never change it."""

    @cache
    def make(name: str) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            case = _MAKERS[name]()
        size = case.own_forward().square().mean().sqrt()
        with torch.no_grad():
            case.unet.conv_out.weight /= size
            case.unet.conv_out.bias /= size
        return case

    return make


def _pixel() -> Case:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return Case(unet.eval(), torch.randn(2, 1, 8, 8), 500, {})


def _labels() -> Case:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    return Case(unet.eval(), torch.randn(2, 1, 8, 8), 500, {"class_labels": torch.tensor([0, 2])})


def _resnet() -> Case:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return Case(unet.eval(), torch.randn(2, 1, 8, 8), 500, {})


def _conditional(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(options | changes)).eval()


def _sd() -> Case:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    cond = {"encoder_hidden_states": 3 * torch.randn(2, 5, 12), "encoder_attention_mask": mask}
    # 9x6 is divisible by no downsampling factor: the sizes of the skip inputs are passed on.
    return Case(_conditional(), torch.randn(2, 4, 9, 6), 501, cond)


def _nomid() -> Case:
    unet = _conditional(mid_block_type=None, layers_per_block=1)
    return Case(unet, torch.randn(2, 4, 8, 8), 501, {"encoder_hidden_states": torch.randn(2, 5, 12)})


def _sdxl() -> Case:
    unet = _conditional(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )
    cond = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "added_cond_kwargs.text_embeds": torch.randn(2, 10),
        "added_cond_kwargs.time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }
    return Case(unet, torch.randn(2, 4, 8, 8), 501, cond)


def _upscaler() -> Case:
    unet = _conditional(in_channels=7, num_class_embeds=20, only_cross_attention=(True, True, False))
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12), "class_labels": torch.tensor([7, 12])}
    return Case(unet, torch.randn(2, 7, 8, 8), 501, cond)


def _audioldm2() -> Case:
    pytest.importorskip("transformers")
    from diffusers import AudioLDM2UNet2DConditionModel

    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 12, 20), (None, 12, 20)),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    cond = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_hidden_states_1": torch.randn(2, 4, 20),
        "encoder_attention_mask_1": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    }
    return Case(unet.eval(), torch.randn(2, 4, 10, 7), 501, cond)


def _k() -> Case:
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=5,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=24,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=12,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        mid_block_type=None,
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    cond = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timestep_cond": torch.randn(2, 24),
    }
    time = float(torch.tensor(0.37).log() * 0.25)
    return Case(unet.eval(), torch.randn(2, 8, 16, 16), time, cond)


_MAKERS: dict[str, Callable[[], Case]] = {
    "pixel": _pixel,
    "labels": _labels,
    "resnet": _resnet,
    "sd": _sd,
    "nomid": _nomid,
    "sdxl": _sdxl,
    "upscaler": _upscaler,
    "audioldm2": _audioldm2,
    "k": _k,
}
