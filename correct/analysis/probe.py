"""The prediction of one sampler step as a function of the sample, anywhere near where a run passed.

symbol    here              meaning
x_t       sample            the sample that the step started from, as the pipeline holds it
ε(x, t)   predict           the prediction, guided as the pipeline guides, of the scheduler's own kind
A_t, B_t  coefficients      the deterministic step is x_{t-1} = A_t x_t + B_t ε(x_t, t)
J_t       push (J v), pull (Jᵀ w)   ∂ε/∂x at x_t
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.correct.guidance import Guidance
from errata.correct.noise_levels import NoiseLevels
from errata.errors import ErrataError, PlanError
from errata.runtime.denoiser import Denoiser, UNetDenoiser
from errata.runtime.run import UNetCall

Full = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]
"""A full evaluation: the network's input, the call and its conditioning; the prediction alone."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One step of a run; rows of a batch stand for displaced copies of its samples, in any order and number.

    Attributes:
        calls: the denoiser calls of the step: one, or two where guidance takes two.
        sample: x_t, `(B, …)`.
        guidance: what the pipeline did around the network.
        levels: noise levels of the run.
        denoiser: whose full calls are probed.
        batch_size: most rows of one denoiser call.
    """

    calls: tuple[UNetCall, ...]
    sample: Tensor
    guidance: Guidance
    levels: NoiseLevels
    denoiser: Denoiser
    batch_size: int

    @property
    def step(self) -> int:
        """Index of the (first) denoiser call."""
        return self.calls[0].step

    @property
    def dimension(self) -> int:
        """Numbers in one sample, D."""
        return self.sample[0].numel()

    @property
    def rms(self) -> Tensor:
        """Root mean square of each sample, `(B,)`, float64."""
        return self.sample.flatten(1).double().square().mean(dim=1).sqrt()

    def coefficients(self) -> tuple[float, float]:
        """A_t and B_t of the deterministic DDIM step from here to the next.

        For a network that predicts ε, A = a'/a and B = b' - b A, with the signal a and the noise b before the
        step, a' and b' after it; for other kinds of prediction, what follows from them.

        Source: "Iterative Error Correction", Eq. 5.
        """
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        to = self.step + len(self.calls)
        a = self.levels.jump(one, zero, self.step, to)
        b = self.levels.jump(zero, one, self.step, to)
        return float(a), float(b)

    def predict(self, points: Tensor, rows: Tensor) -> Tensor:
        """ε at `points`, `(P, D)` in and out, float64; point i belongs to sample `rows[i]`."""
        return torch.cat([self._guided(self._full, x, own) for x, own in self._chunks(points, rows)])

    def push(self, directions: Tensor, rows: Tensor, size: Tensor) -> Tensor:
        """J v by central differences, `(P, D)`: unit directions; sample j is displaced by ± `size[j]`.

        Raises:
            ErrataError: a prediction is not finite.
        """
        x = self.sample.flatten(1).double()[rows]
        h = size[rows].unsqueeze(1)
        points = torch.cat([x + h * directions, x - h * directions])
        ahead, behind = self.predict(points, rows.repeat(2)).chunk(2)
        pushed = (ahead - behind) / (2 * h)
        if not bool(pushed.isfinite().all()):
            raise ErrataError(
                f"step {self.step}: the denoiser returned NaN or infinite values near a trajectory of its "
                "own; sample once without analysis to see whether the artifact alone does it too"
            )
        return pushed

    def pull(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        """Jᵀ w by automatic differentiation, `(P, D)`.

        Raises:
            PlanError: the denoiser holds no network that gradients pass through.
        """
        full = self._differentiable()
        pulled: list[Tensor] = []
        for w, own in self._chunks(cotangents, rows):
            with torch.inference_mode(False), torch.enable_grad():
                x = self.sample.flatten(1).double()[own].clone().requires_grad_(True)
                value = self._guided(full, x, own)
                pulled.append(torch.autograd.grad((value * w).sum(), x)[0])
        return torch.cat(pulled)

    def _chunks(self, points: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, self.batch_size // self.guidance.copies)
        return list(zip(points.split(size), rows.split(size), strict=True))

    def _guided(self, full: Full, points: Tensor, rows: Tensor) -> Tensor:
        x = points.to(self.sample.dtype).reshape(-1, *self.sample.shape[1:])
        scaled = self.levels.scaled(x, self.step)
        raws = [self._raw(full, scaled, rows, call) for call in self.calls]
        wide = torch.promote_types(raws[0].dtype, torch.float32)
        return self.guidance.prediction([raw.to(wide) for raw in raws], x).flatten(1).double()

    def _raw(self, full: Full, scaled: Tensor, rows: Tensor, call: UNetCall) -> Tensor:
        cond = self.guidance.conditioning(rows, call)
        return full(self.guidance.expand(scaled, rows, call), call.step, cond)

    def _full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> Tensor:
        return self.denoiser.full(x, step, cond)[0]

    def _differentiable(self) -> Full:
        denoiser = self.denoiser
        if not isinstance(denoiser, UNetDenoiser):
            raise PlanError(
                f"a {type(denoiser).__name__} holds no network that gradients pass through; take "
                'method "arnoldi" for a lower bound'
            )

        def full(x: Tensor, step: int, cond: Mapping[str, Tensor]) -> Tensor:
            # `UNetDenoiser.full` forbids gradients; a network without quantizers needs no clock.
            return denoiser.unet.full(x, denoiser.timesteps[step], cond, branch=0)[0]

        return full
