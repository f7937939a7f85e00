"""IEC on guided pipelines, against their sampling loop written out, with the float network.

The loop evaluates one half of the guidance after the other and knows nothing of `errata.correct`.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from errata.correct import IEC, Plan, wrap
from errata.deploy import DeployedPipeline
from errata.runtime.unet import BranchedUNet

Build = Callable[[str], Any]
Artifact = Callable[[str], DeployedPipeline]
LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
# Of the largest latent. Sums of a convolution depend on the batch size: 2e-6 at most was measured.
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2
STEP_SIZE, ITERATIONS = 0.4, 2
PLAN = Plan(IEC(step_size=STEP_SIZE, iterations=ITERATIONS, tolerance=0.0), "full")


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass
class OwnLoop:
    """A text-to-image pipeline's loop, one half of the guidance after the other; `wrong` names a mistake."""

    small: Any
    deployed: DeployedPipeline
    guidance_rescale: float
    wrong: str = ""

    @torch.no_grad()
    def latents(self) -> Tensor:
        pipe, schedule = self.small.pipe, self.deployed.schedule
        self.network, self.halves = BranchedUNet(copy.deepcopy(pipe.unet)), self.conditions()
        self.branch = schedule.branch
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(self.deployed.num_inference_steps)
        seeds = [Generator().manual_seed(index) for index in range(2)]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=seed) for seed in seeds])
        x = noise * scheduler.init_noise_sigma
        features: list[Tensor] = []
        for call, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)  # Euler looks up its place at the first step
            before = copy.deepcopy(scheduler)
            if schedule.kind(call) == "cached":
                prediction, _ = self.predict(before, x, t, features)
                x = scheduler.step(prediction, t, x).prev_sample
                continue
            prediction, features = self.predict(before, x, t, None)
            y = scheduler.step(prediction, t, x).prev_sample
            for _ in range(0 if self.wrong == "not corrected" else ITERATIONS):
                at_y, features_at_y = self.predict(before, y, t, None, is_extra=True)
                if before.config.prediction_type == "v_prediction" and self.wrong != "v as at x_t":
                    at_y = self.meant(before, at_y, y, x, t)
                target = copy.deepcopy(before).step(at_y, t, x).prev_sample
                y = y + STEP_SIZE * (target - y)  # Eq. 10
                features = features if self.wrong == "features kept" else features_at_y
            x = y
        return x

    def meant(self, scheduler: Any, v: Tensor, y: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The v at x that means the ε that `v` means at y, where the input is not scaled."""
        signal, noise = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        eps = signal * v + noise * y
        return (eps - noise * x) / signal

    def predict(
        self, scheduler: Any, x: Tensor, t: Tensor, stored: list[Tensor] | None, *, is_extra: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        is_scaled = not (is_extra and self.wrong == "unscaled input")
        scaled = copy.deepcopy(scheduler).scale_model_input(x, t) if is_scaled else x
        halves, features = [], []
        for index, cond in enumerate(self.halves):
            if stored is None:
                half, feature = self.network.full(scaled, float(t), cond, branch=self.branch)
                assert feature is not None
                features.append(feature)
            else:
                half = self.network.cached(scaled, float(t), cond, stored[index], branch=self.branch)
            halves.append(half)
        if is_extra and self.wrong == "one half":
            return halves[1], features
        rescale = 0.0 if is_extra and self.wrong == "not rescaled" else self.guidance_rescale
        return self.combined(halves, rescale), features

    def combined(self, halves: list[Tensor], rescale: float) -> Tensor:
        unconditional, conditional = halves
        guided = unconditional + self.small.inputs["guidance_scale"] * (conditional - unconditional)
        images = [
            (1 - rescale + rescale * one.std() / whole.std()) * whole
            for one, whole in zip(conditional, guided, strict=True)
        ]
        return torch.stack(images)

    def conditions(self) -> list[Mapping[str, Tensor]]:
        """What the network gets beside the sample in each half: unconditional first."""
        pipe, inputs = self.small.pipe, self.small.inputs
        found = pipe.encode_prompt(
            prompt=inputs["prompt"],
            negative_prompt=inputs["negative_prompt"],
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        if len(found) == 2:
            conditional, unconditional = found
            return [{"encoder_hidden_states": one} for one in (unconditional, conditional)]
        conditional, unconditional, pooled, unconditional_pooled = found
        size = 8 * pipe.vae_scale_factor  # of the image, in pixels
        times = torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=torch.float32)
        return [
            {
                "encoder_hidden_states": one,
                "added_cond_kwargs.text_embeds": text,
                "added_cond_kwargs.time_ids": times,
            }
            for one, text in ((unconditional, unconditional_pooled), (conditional, pooled))
        ]


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", ["sd 2", "sdxl"])
def test_iec_on_a_guided_pipeline(
    name: str, guidance_rescale: float, small_pipeline: Build, small_artifact: Artifact
) -> None:
    small, deployed = small_pipeline(name), small_artifact(name)
    own = OwnLoop(small, deployed, guidance_rescale)
    expected = own.latents()
    found = wrap(deployed, PLAN)(
        generator=[Generator().manual_seed(index) for index in range(2)],
        output_type="latent",
        guidance_rescale=guidance_rescale,
        **small.inputs,
    ).images
    mistakes = ["not corrected", "features kept", "one half"]
    mistakes += ["not rescaled"] if guidance_rescale else []
    mistakes += ["unscaled input"] if name == "sdxl" else ["v as at x_t"]
    wrong = {}
    for mistake in mistakes:
        own.wrong = mistake
        wrong[mistake] = distance(own.latents(), expected)
    right = distance(found, expected)
    LOG.info("%s, rescale %g: %.1e, wrong %s", name, guidance_rescale, right, wrong)
    assert right < TOLERANCE
    assert min(wrong.values()) > 10 * TOLERANCE
