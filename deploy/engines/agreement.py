"""How far an engine may be from the reference arithmetic of its artifact, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from errata.compress.network.denoiser import Conditioning, Denoiser
from errata.errors import ArtifactError

# Of `distance`. Both compute the same codes but for values half way between two, which float sums of another
# order round the other way; later layers amplify that. In a small network most samples meet no such value,
# and are 1e-6 away; a DDPM-CIFAR10 network with random weights is 0.03 away in W8A8, as oneDNN's kernels are.
BOUND = 0.06
# Features and predictions that nothing rounds differ by the order of sums alone.
FLOAT_BOUND = 1e-4


@torch.no_grad()
def check_agreement(
    engine: Denoiser, reference: Denoiser, sample: Tensor, cond: Conditioning, *, rounds: bool
) -> None:
    """Compares both at the first, middle and last step, in full and from the same feature.

    Args:
        engine: what was exported.
        reference: the artifact on its reference backend.
        sample: an input, `(B, C, H, W)`; of few samples, one that meets a rounding on a tie decides.
        cond: its conditions.
        rounds: whether anything is quantized.

    Raises:
        ArtifactError: they differ by more than `BOUND`, or `FLOAT_BOUND` where nothing is quantized.
    """
    bound = BOUND if rounds else FLOAT_BOUND
    for step in checked_steps(reference.schedule.num_steps):
        for what, found, expected in _answers(engine, reference, sample, cond, step):
            away = distance(found, expected)
            if not away <= bound:  # NaN is no agreement
                raise ArtifactError(
                    f"the engine's {what} at step {step} is {away:.2g} of its size away from the "
                    f"reference backend's; allowed is {bound:g}: onnxruntime, or torch's exporter, computes "
                    "something else in this version; install another, or deploy without an engine"
                )


def checked_steps(num_steps: int) -> tuple[int, ...]:
    """First, middle and last."""
    return tuple(sorted({0, num_steps // 2, num_steps - 1}))


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference to that of `expected`: of each sample, and the median of them.

    A wrong graph is wrong for every sample; a value that is rounded the other way is met by some.
    """
    away = (found - expected).flatten(1).square().mean(dim=1).sqrt()
    return float((away / expected.flatten(1).square().mean(dim=1).sqrt()).median())


def _answers(
    engine: Denoiser, reference: Denoiser, sample: Tensor, cond: Conditioning, step: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    found, found_feature = engine.full(sample, step, cond)
    expected, feature = reference.full(sample, step, cond)
    yield "full prediction", found, expected
    if feature is None or found_feature is None:
        return
    yield "feature", found_feature, feature
    cached = engine.cached(sample, step, cond, feature)
    yield "cached prediction", cached, reference.cached(sample, step, cond, feature)
    extrapolated = engine.cached(sample, step, cond, feature, is_extrapolated=True)
    expected = reference.cached(sample, step, cond, feature, is_extrapolated=True)
    yield "cached prediction from an extrapolated feature", extrapolated, expected
