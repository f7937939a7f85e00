"""Latent diffusion from class labels, or from nothing: the ImageNet and LSUN models.

Diffusers 0.42 has no pipeline that takes class labels, and its unconditional `LDMPipeline` is deprecated.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from errata.pipelines.class_embedder import ClassEmbedder, Labels, label_tensor

__all__ = ["ClassConditionalLDMPipeline"]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """A pipeline that draws latents with a UNet that may know class labels, and decodes them.

    A label reaches the UNet in one of two ways: as `class_labels`, where the UNet has `num_class_embeds`; or
    through `class_embedder` as the context of its cross attention. A UNet with neither is unconditional.

    Args:
        vae: decoder of the latents, vector-quantized or KL.
        unet: the denoiser.
        scheduler: any scheduler of diffusers.
        class_embedder: for a UNet with cross attention; its last row is the unconditional class.
        unconditional_label: which label means "no class" to a UNet with `num_class_embeds`; None if none
            does, and then there is no guidance.
        splits_guidance: with guidance, call the UNet twice in each step, for the unconditional half of the
            batch and for the conditional one, instead of once for both. Its activations take half the memory.

    Raises:
        ValueError: UNet and embedder do not fit each other, or there is no such label.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models" (CVPR 2022); Ho and
    Salimans, "Classifier-free diffusion guidance" (2022).
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"
    _optional_components = ["class_embedder"]  # noqa: RUF012 - the base class's type

    def __init__(
        self,
        vae: VQModel | AutoencoderKL,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        class_embedder: ClassEmbedder | None = None,
        unconditional_label: int | None = None,
        splits_guidance: bool = False,
    ) -> None:
        super().__init__()
        _check_parts(unet.config, class_embedder, unconditional_label)
        if type(splits_guidance) is not bool:
            raise ValueError(f"splits_guidance is {splits_guidance!r}; allowed are True and False")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)
        self.register_to_config(unconditional_label=unconditional_label)
        if splits_guidance:  # else folders stay as releases without this setting write and read them
            self.register_to_config(splits_guidance=True)

    @property
    def num_labels(self) -> int:
        """Labels that can be asked for, the unconditional one among them; 0 for an unconditional model."""
        if self.class_embedder is not None:
            return int(self.class_embedder.num_labels)
        return int(getattr(self.unet.config, "num_class_embeds", None) or 0)

    @property
    def unconditional_label(self) -> int | None:
        """The label that means "no class"; None if there is none."""
        if self.class_embedder is not None:
            return int(self.class_embedder.unconditional_label)
        label: int | None = self.config.unconditional_label
        return label

    @property
    def splits_guidance(self) -> bool:
        """Whether guidance calls the UNet once for each half instead of once for both."""
        return bool(self.config.get("splits_guidance", False))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one sample per label.

        Args:
            class_labels: one label per sample, or one for all of them; none for an unconditional model.
            batch_size: how many samples; None is one per label, or one.
            num_inference_steps: steps of the scheduler.
            guidance_scale: 1 is no guidance. Otherwise the unconditional half comes first, in one batch with
                the conditional one or, with `splits_guidance`, in a call of its own.
            eta: share of fresh noise, for the schedulers that know it.
            generator: for the initial noise and the scheduler's; a list has one per sample.
            latents: the initial noise `(B, C, H, W)`, of unit size, instead of a drawn one.
            output_type: "pil", "np" `(B, H, W, 3)`, "pt" `(B, 3, H, W)`, both in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called after each step with pipeline, step index, timestep and
                `{"latents": …}`; what it returns under "latents" takes their place.

        Raises:
            ValueError: an argument is out of range, or they contradict each other.
        """
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed are {', '.join(_OUTPUT_TYPES)}")
        labels, size = self._labels(class_labels, batch_size)
        is_guided = guidance_scale != 1.0
        calls = self._conditioning(labels, is_guided=is_guided)
        latents = self._initial_latents(latents, size, generator, num_inference_steps)
        options = self._step_options(eta, generator)
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            rows = torch.cat([latents, latents]) if is_guided and len(calls) == 1 else latents
            rows = self.scheduler.scale_model_input(rows, t)
            eps = torch.cat([self.unet(rows, t, **cond).sample for cond in calls])
            if is_guided:
                unconditional, conditional = eps.chunk(2)
                eps = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(eps, t, latents, **options).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, index, t, {"latents": latents}) or {}
                latents = changed.get("latents", latents)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: Labels | None, batch_size: int | None) -> tuple[Tensor | None, int]:
        """Return the labels `(B,)` and B."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if self.num_labels == 0:
            if given is not None:
                raise ValueError("class_labels were given, but this model is unconditional; leave them out")
            return None, batch_size or 1
        if given is None:
            raise ValueError(
                f"this model needs class_labels: one label of 0 to {self.num_labels - 1} per sample"
            )
        labels = label_tensor(
            given, batch_size=batch_size, num_labels=self.num_labels, device=self._execution_device
        )
        return labels, len(labels)

    def _conditioning(self, labels: Tensor | None, *, is_guided: bool) -> list[dict[str, Tensor]]:
        """Return the UNet's other arguments in each call of a step; with guidance, unconditional first."""
        if is_guided:
            nothing = self.unconditional_label
            if labels is None or nothing is None:
                why = "is unconditional" if labels is None else "has no unconditional_label"
                raise ValueError(f"guidance needs an unconditional class, this model {why}; guidance_scale=1")
            labels = torch.cat([torch.full_like(labels, nothing), labels])
        if labels is None:
            return [{}]
        halves = labels.chunk(2) if is_guided and self.splits_guidance else (labels,)
        if self.class_embedder is None:
            return [{"class_labels": half} for half in halves]
        return [{"encoder_hidden_states": self.class_embedder(half).to(self.unet.dtype)} for half in halves]

    def _initial_latents(
        self,
        given: Tensor | None,
        size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
    ) -> Tensor:
        """Return noise at the scheduler's initial size; also sets the scheduler's timesteps."""
        sample_size = self.unet.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        shape = (size, int(self.unet.config.in_channels), height, width)
        if isinstance(generator, list) and len(generator) != size:
            raise ValueError(f"{len(generator)} generators for {size} samples; give one per sample")
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(given.shape)}; expected {shape}")
        device, dtype = self._execution_device, self.unet.dtype
        if given is None:
            given = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents: Tensor = given.to(device, dtype) * self.scheduler.init_noise_sigma
        return latents

    def _step_options(
        self, eta: float, generator: torch.Generator | list[torch.Generator] | None
    ) -> dict[str, Any]:
        """Return those of eta and generator that this scheduler takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in taken:
            raise ValueError(f"{type(self.scheduler).__name__} takes no eta, got {eta}; use eta=0")
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in taken}

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        config = self.vae.config
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(scaled.to(self.vae.dtype)).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _check_parts(config: Any, embedder: ClassEmbedder | None, unconditional_label: int | None) -> None:
    """Check that label, embedder and the UNet's configuration fit each other."""
    width = getattr(config, "cross_attention_dim", None)
    widths = {width} if width is None or isinstance(width, int) else set(width)
    if embedder is None and width is not None:
        raise ValueError("the unet has cross attention: give a class_embedder that makes its context")
    if embedder is not None and widths != {embedder.config.embedding_dim}:
        raise ValueError(
            f"class_embedder has width {embedder.config.embedding_dim}, the unet's cross attention {width}; "
            "they must be equal"
        )
    if unconditional_label is None:
        return
    labels = getattr(config, "num_class_embeds", None) or 0
    if embedder is not None or not 0 <= unconditional_label < labels:
        raise ValueError(
            f"unconditional_label is {unconditional_label}, but the unet has {labels} class embeddings"
            f"{' and a class_embedder, whose last row has that meaning' if embedder is not None else ''}; "
            "leave it out"
        )
