"""Pipelines with guidance, conditioning and every kind of scheduler, small enough for milliseconds."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor


class GuidedPipeline(DiffusionPipeline):
    """What Stable Diffusion does, without its text encoder: guidance, conditioning, any scheduler."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        class_labels: torch.Tensor | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        generator: list[torch.Generator] | None = None,
        unguided_steps: int = 0,
    ) -> tuple[torch.Tensor]:
        labels = torch.zeros(len(prompt or ()), dtype=torch.long) if class_labels is None else class_labels
        texts = [""] * len(labels) if prompt is None else prompt
        embeds = torch.stack([embed(text) for text in texts])
        self.scheduler.set_timesteps(num_inference_steps)
        self.latest_guidance = guidance_scale  # as real pipelines do, to be forgotten afterwards
        x = randn_tensor((len(texts), 1, 8, 8), generator=generator) * self.scheduler.init_noise_sigma
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            is_guided = guidance_scale > 1 and index >= unguided_steps
            rows = torch.cat([x, x]) if is_guided else x
            words = torch.cat([torch.zeros_like(embeds), embeds]) if is_guided else embeds
            eps = self.unet(
                self.scheduler.scale_model_input(rows, t),
                t,
                encoder_hidden_states=words,
                class_labels=torch.cat([labels, labels]) if is_guided else labels,
                timestep_cond=None,
                added_cond_kwargs={"size": torch.full((rows.shape[0], 2), float(index))},
                return_dict=False,
            )[0]
            if is_guided:
                plain, guided = eps.chunk(2)
                eps = plain + guidance_scale * (guided - plain)
            x = self.scheduler.step(eps, t, x).prev_sample
        return (x,)


def embed(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def _guided_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=8,
            norm_num_groups=4,
            num_class_embeds=4,
        ).eval()
    with torch.no_grad():  # noise of about unit size, so that a wrong trajectory shows
        unet.conv_out.weight *= 20
    return unet


@pytest.fixture
def guided_pipeline(_guided_unet: UNet2DConditionModel) -> Callable[..., GuidedPipeline]:
    """Makes a guided pipeline around a scheduler."""

    def make(scheduler: Any = None) -> GuidedPipeline:
        pipe = GuidedPipeline(_guided_unet, scheduler or DDIMScheduler(clip_sample=False))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def saved_pipeline(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers directory."""
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture
def count_calls(tiny_pipeline: DDIMPipeline) -> Any:
    """A list that grows with each call of the tiny pipeline's UNet."""
    calls: list[int] = []
    handle = tiny_pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()
