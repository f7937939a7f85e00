"""Checks that an engine computes what its artifact's reference backend computes, within a measured bound.

Both compute the same codes but for values half way between two: float sums of another order round them the
other way, and later layers amplify that. How much, depends on the network: random weights of DDPM-CIFAR10 in
W8A8 move by 0.03 at the first step and 0.06 in the middle, whether another kernel computes them, or the
reference itself with noise of one float32 rounding on its layers' outputs. So that is what the bound comes
from: what such noise does to the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from errata.deploy.pipeline import DeployedPipeline
from errata.errors import ArtifactError
from errata.runtime.denoiser import Conditioning, Denoiser

# Times what float32 rounding does to the reference: two draws of the same noise differ.
MARGIN = 2.0
# By how many roundings a layer is off. With constant scales it is the difference of two larger numbers.
ROUNDINGS = {"gathered": 1, "qdq": 16}
# At least: in a small network few samples meet a value on a tie, not the same with noise, and move by 0.03.
LEAST_BOUND = 0.05
# Features and predictions that nothing rounds differ by the order of sums alone.
FLOAT_BOUND = 1e-4
_Answers = list[tuple[str, Tensor]]


@torch.no_grad()
def check_agreement(
    engine: Denoiser, reference: DeployedPipeline, sample: Tensor, cond: Conditioning, *, form: str
) -> None:
    """Compare both at the first, middle and last step, in full and from the same feature.

    Args:
        engine: what was exported.
        reference: the artifact on its reference backend.
        sample: an input, `(B, C, H, W)`; of few samples, one that meets a value on a tie decides.
        cond: its conditions.
        form: of the engine.

    Raises:
        ArtifactError: their `distance` is above `MARGIN` times that of the reference with float32 noise from
            itself (`LEAST_BOUND` if that is less), or above `FLOAT_BOUND` where nothing is quantized.
    """
    layers = [
        reference.pipe.unet.module.unet.get_submodule(layer.name)
        for layer in reference.manifest.scheme.layers
    ]
    for step in checked_steps(reference.schedule.num_steps):
        expected, feature = _answers(reference.denoiser, sample, step, cond, None)
        with _rounding_noise(layers, roundings=ROUNDINGS[form]):
            moved, _ = _answers(reference.denoiser, sample, step, cond, feature)
        found, _ = _answers(engine, sample, step, cond, feature)
        for (what, right), (_, noisy), (_, given) in zip(expected, moved, found, strict=True):
            bound = max(LEAST_BOUND, MARGIN * distance(noisy, right)) if layers else FLOAT_BOUND
            away = distance(given, right)
            if not away <= bound:  # NaN is no agreement
                raise ArtifactError(
                    f"the engine's {what} at step {step} is {away:.2g} of its size away from the reference "
                    f"backend's; allowed is {bound:.2g}: onnxruntime, or torch's exporter, computes "
                    "something else in this version; install another, or deploy without an engine"
                )


def checked_steps(num_steps: int) -> tuple[int, ...]:
    """Return the first, middle and last step."""
    return tuple(sorted({0, num_steps // 2, num_steps - 1}))


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference over that of `expected`: of each sample, then their median.

    A wrong graph is wrong for every sample; a value that is rounded the other way is met by some.
    """
    away = (found - expected).flatten(1).square().mean(dim=1).sqrt()
    return float((away / expected.flatten(1).square().mean(dim=1).sqrt()).median())


@contextmanager
def _rounding_noise(layers: Sequence[nn.Module], *, roundings: float) -> Iterator[None]:
    """Add noise of so many float32 roundings to what the layers give."""
    generator = torch.Generator().manual_seed(0)
    rounding = roundings * torch.finfo(torch.float32).eps

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output * (1 + rounding * torch.randn(output.shape, generator=generator))

    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answers(
    denoiser: Denoiser, sample: Tensor, step: int, cond: Conditioning, feature: Tensor | None
) -> tuple[_Answers, Tensor | None]:
    """Return all that it computes at a step, cached calls from `feature`, or its own; and that feature."""
    prediction, own = denoiser.full(sample, step, cond)
    answers = [("full prediction", prediction)]
    if own is None:
        return answers, None
    feature = own if feature is None else feature
    plain = denoiser.cached(sample, step, cond, feature)
    extrapolated = denoiser.cached(sample, step, cond, feature, is_extrapolated=True)
    answers += [
        ("feature", own),
        ("cached prediction", plain),
        ("cached prediction from an extrapolated feature", extrapolated),
    ]
    return answers, feature
