"""The class-conditional pipeline against a loop written out here, and everything that it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from errata import CalibrationError, calibration
from errata.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

Build = Callable[[str], Any]
STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(*seeds: int) -> Tensor:
    return torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(*seeds)])


def draw(pipe: Any, *seeds: int, **arguments: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe(generator=generators(*seeds) or None, **options).images


@torch.no_grad()
def guided_by_hand(pipe: Any, labels: list[int], nothing: int, scale: float, *seeds: int) -> Tensor:
    """Two calls of the network per step, and DDIM from its formula."""
    x = noise(*seeds)
    pipe.scheduler.set_timesteps(STEPS)
    alphas, final = pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod
    for t in pipe.scheduler.timesteps.tolist():
        both = []
        for given in ([nothing] * len(labels), labels):
            known = torch.tensor(given)
            if pipe.class_embedder is None:
                both.append(pipe.unet(x, t, class_labels=known).sample)
            else:
                context = pipe.class_embedder.embedding.weight[known][:, None]
                both.append(pipe.unet(x, t, encoder_hidden_states=context).sample)
        eps = both[0] + scale * (both[1] - both[0])
        now, then = alphas[t], alphas[t - 250] if t >= 250 else final
        x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps
    return x


@pytest.fixture
def by_context(small_pipeline: Build) -> ClassConditionalLDMPipeline:
    """The pipeline with a class embedder, with DDIM."""
    parts = dict(small_pipeline("ldm context kl").pipe.components)
    parts["scheduler"] = small_pipeline("ldm labels vq").pipe.scheduler
    pipe = ClassConditionalLDMPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("kind", ["labels", "context"])
def test_it_is_guided_ddim(
    kind: str, scale: float, small_pipeline: Build, by_context: ClassConditionalLDMPipeline
) -> None:
    pipe = by_context if kind == "context" else small_pipeline("ldm labels vq").pipe
    found = draw(pipe, 1, 2, class_labels=[3, 7], guidance_scale=scale)
    expected = guided_by_hand(pipe, [3, 7], 10, scale, 1, 2)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = guided_by_hand(pipe, [3, 8], 10, scale + 0.5, 1, 2)
    assert (found - other).abs().max() > 1e-3


def test_an_unconditional_model(small_pipeline: Build) -> None:
    pipe = small_pipeline("ldm unconditional").pipe
    latents = draw(pipe, 1, 2, batch_size=2)
    assert torch.equal(latents, draw(pipe, batch_size=2, latents=noise(1, 2)))
    torch.testing.assert_close(latents[1:], draw(pipe, 2), rtol=0, atol=1e-4)  # neighbours do not matter
    stochastic = draw(pipe, 1, 2, batch_size=2, eta=1.0)
    assert (stochastic - latents).abs().max() > 0.1
    assert torch.equal(stochastic, draw(pipe, 1, 2, batch_size=2, eta=1.0))


def test_one_label_serves_a_whole_batch(small_pipeline: Build) -> None:
    pipe = small_pipeline("ldm labels vq").pipe
    expected = draw(pipe, 1, 2, class_labels=[4, 4])
    assert torch.equal(draw(pipe, 1, 2, class_labels=4, batch_size=2), expected)
    assert torch.equal(draw(pipe, 1, 2, class_labels=torch.tensor([4, 4]), batch_size=2), expected)


@pytest.mark.parametrize("name", ["ldm labels vq", "ldm context kl"])
def test_decoding_undoes_the_scaling(name: str, small_pipeline: Build) -> None:
    pipe = small_pipeline(name).pipe
    latents = draw(pipe, 1, 2, class_labels=[0, 1])
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    images = draw(pipe, 1, 2, class_labels=[0, 1], output_type="pt")
    assert torch.equal(images, expected)
    (array,) = pipe(
        [0, 1], generator=generators(1, 2), num_inference_steps=STEPS, output_type="np", return_dict=False
    )
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), expected)
    pictures = pipe([0, 1], generator=generators(1, 2), num_inference_steps=STEPS).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_a_decoder_with_a_shift(small_pipeline: Build) -> None:
    pipe = small_pipeline("ldm unconditional").pipe
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=4, shift_factor=0.5)
    shifted = ClassConditionalLDMPipeline(vae, pipe.unet, pipe.scheduler)
    shifted.set_progress_bar_config(disable=True)
    with torch.no_grad():
        decoded = vae.decode(draw(shifted, 1) / 0.18215 + 0.5).sample
    assert torch.equal(draw(shifted, 1, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))


def test_the_callback_sees_and_changes_every_step(small_pipeline: Build) -> None:
    pipe = small_pipeline("ldm unconditional").pipe
    seen: list[tuple[int, int]] = []

    def zero(_: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        seen.append((index, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == STEPS - 1 else None

    assert not draw(pipe, 1, callback_on_step_end=zero).any()
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), DPMSolverMultistepScheduler()])
def test_schedulers_that_take_no_eta(scheduler: Any, small_pipeline: Build) -> None:
    parts = {**small_pipeline("ldm unconditional").pipe.components, "scheduler": scheduler}
    pipe = ClassConditionalLDMPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(draw(pipe, 1)).all()
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} takes no eta, got 0.5; use eta=0"):
        draw(pipe, 1, eta=0.5)


@pytest.mark.parametrize("name", ["ldm labels vq", "ldm context kl", "ldm unconditional"])
def test_it_survives_diffusers_folders(name: str, small_pipeline: Build, tmp_path: Path) -> None:
    small = small_pipeline(name)
    small.pipe.save_pretrained(tmp_path / "saved")
    for opened in (
        calibration.load_pipeline(tmp_path / "saved"),
        ClassConditionalLDMPipeline.from_pretrained(tmp_path / "saved"),
    ):
        assert type(opened) is ClassConditionalLDMPipeline
        assert opened.unconditional_label == small.pipe.unconditional_label
        opened.set_progress_bar_config(disable=True)
        expected = draw(small.pipe, 1, 2, **{**small.inputs, "output_type": "pt"})
        assert torch.equal(draw(opened, 1, 2, **{**small.inputs, "output_type": "pt"}), expected)


def test_only_listed_class_names_are_opened(small_pipeline: Build, tmp_path: Path) -> None:
    small_pipeline("ldm unconditional").pipe.save_pretrained(tmp_path / "saved")
    index = tmp_path / "saved" / "model_index.json"
    for name in ("ClassEmbedder", "errata.pipelines.ClassConditionalLDMPipeline", "registry"):
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
        with pytest.raises(CalibrationError, match="cannot be opened as a pipeline"):
            calibration.load_pipeline(tmp_path / "saved")


def test_it_is_calibrated_with_labels(small_pipeline: Build, tmp_path: Path) -> None:
    pipe = small_pipeline("ldm labels vq").pipe
    batches = [{"class_labels": [1, 2]}, {"class_labels": [3]}]
    arguments: dict[str, Any] = {
        "num_inference_steps": 2,
        "num_samples": 3,
        "batch_size": 2,
        "guidance_scale": 2.0,
    }
    recorded = calibration.collect(pipe, tmp_path / "set", inputs=batches, **arguments)
    assert recorded.cond_names == ("class_labels",)
    assert recorded.rows_per_sample == 2
    labels = [record.cond["class_labels"].tolist() for record in recorded.batches(1)]
    assert labels == [[10, 10, 1, 2], [10, 3]]
    for message, inputs in {
        "this model needs class_labels": None,
        "1 class_labels for batch_size=2": [{"class_labels": [1]}] * 2,
    }.items():
        with pytest.raises(CalibrationError, match=f"refused its arguments: {message}"):
            calibration.collect(pipe, tmp_path / "other", inputs=inputs, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ldm labels vq", {}, "needs class_labels: one label of 0 to 10 per sample"),
        ("ldm labels vq", {"class_labels": [11]}, "class label 11 is out of range; allowed are 0 to 10"),
        ("ldm context kl", {"class_labels": [-1]}, "class label -1 is out of range; allowed are 0 to 10"),
        (
            "ldm labels vq",
            {"class_labels": [1, 2], "batch_size": 3},
            "2 class_labels for batch_size=3; give one",
        ),
        ("ldm labels vq", {"class_labels": []}, "class_labels are empty"),
        ("ldm labels vq", {"class_labels": [0.5]}, "must be whole numbers, one per sample"),
        ("ldm labels vq", {"class_labels": [[1]]}, "must be whole numbers, one per sample"),
        ("ldm labels vq", {"class_labels": [1, 2, 3]}, "2 generators for 3 samples; give one per sample"),
        ("ldm unconditional", {"class_labels": [1]}, "this model is unconditional; leave them out"),
        ("ldm unconditional", {"guidance_scale": 2.0}, "needs an unconditional class, this model is uncond"),
        ("ldm unconditional", {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (
            "ldm unconditional",
            {"output_type": "gif"},
            "output_type is 'gif'; allowed are pil, np, pt, latent",
        ),
        (
            "ldm unconditional",
            {"latents": torch.zeros(1, 4, 9, 9), "batch_size": 2},
            r"latents have the shape \(1, 4, 9, 9\); expected \(2, 4, 8, 8\)",
        ),
    ],
)
def test_arguments_that_make_no_sense(
    name: str, arguments: dict[str, Any], message: str, small_pipeline: Build
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(small_pipeline(name).pipe, 1, 2, **arguments)


def test_guidance_needs_to_know_what_no_class_is(small_pipeline: Build) -> None:
    parts = small_pipeline("ldm labels vq").pipe.components
    pipe = ClassConditionalLDMPipeline(**parts)
    with pytest.raises(ValueError, match="this model has no unconditional_label; guidance_scale=1"):
        draw(pipe, 1, class_labels=[1], guidance_scale=2.0)


def test_parts_that_do_not_fit(small_pipeline: Build) -> None:
    plain, context = (small_pipeline(name).pipe.components for name in ("ldm labels vq", "ldm context kl"))
    for parts, message in [
        (
            {**plain, "unconditional_label": 11},
            "unconditional_label is 11, but the unet has 11 class embeddings",
        ),
        (
            {**context, "unconditional_label": 0},
            "a class_embedder, whose last row has that meaning; leave it out",
        ),
        ({**context, "class_embedder": None}, "the unet has cross attention: give a class_embedder"),
        ({**plain, "class_embedder": ClassEmbedder(10, 16)}, "has width 16, the unet's cross attention None"),
        ({**context, "class_embedder": ClassEmbedder(10, 8)}, "has width 8, the unet's cross attention 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClassConditionalLDMPipeline(**parts)
