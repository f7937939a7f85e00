"""Show how the error of a DDIM run grows from step to step, with and without IEC, on Gaussian data.

    python benchmarks/error_growth.py --out runs/error_growth.png [--steps 100] [--error 0.05] [--samples 256]

The data are Gaussian, N(0, diag(s²)), standard deviations s from 0.05 to 3 in 64 dimensions, so the ideal
prediction is linear, ε(x, t) = σ x / (α² s² + σ²) with x_t = α x_0 + σ ε, and both the float DDIM run and the
exact flow are known. The prediction has one of these errors:

    none       no error: the curve shows how far IEC alone moves a run
    bias       a constant vector, different at every step
    slope      a bias, and a Jacobian that is too large by the same amount
    rounding   rounding to a grid, as in quantization: the error depends on x

Draws δ_t, the root mean square of x̃_t - x_t over samples and dimensions, where x_t is the uncorrected run of
the ideal denoiser: on a log scale, where exponential growth is a straight line, and as a fraction of the
uncorrected run's δ_t. Prints δ at the last step, and

    to exact   the distance from the exact flow, which DDIM itself misses because its steps are finite
    growth     the final size of a unit error in x_T, in the direction that grows most
    kept       how often the guard kept the better iterate, as a fraction of samples x steps
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Generator, Tensor

from errata.correct import IEC, Plan, wrap
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule, StepKind
from errata.runtime.stepped_unet import SteppedUNet

SIZE = 8  # 8x8: 64 dimensions
DEVIATIONS = torch.logspace(math.log10(0.05), math.log10(3), SIZE * SIZE, dtype=torch.float64)
ERRORS = {"none": "no error", "bias": "bias", "slope": "bias and slope", "rounding": "rounding"}
METHODS = {
    "uncorrected": None,
    "IEC, K=1": IEC(iterations=1),
    "IEC, K=5": IEC(iterations=5, tolerance=0.0),
    "fixed point": IEC(iterations=100, tolerance=1e-9),
}

Predict = Callable[[Tensor, int], Tensor]


def main() -> None:
    """Sample, print, draw."""
    parser = argparse.ArgumentParser(description="Growth of the sampling error with and without IEC.")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--error",
        type=float,
        default=0.05,
        help="root mean square error of a prediction (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=256, help="samples to average over (default: %(default)s)"
    )
    options = parser.parse_args()
    flow = Flow(options.steps, options.samples)
    ideal = {name: flow.sample(flow.ideal, method)[0] for name, method in METHODS.items()}
    describe(flow, ideal["uncorrected"])
    curves: dict[str, dict[str, Tensor]] = {kind: {} for kind in ERRORS}
    print(f"{'error':<10}{'method':<13}{'δ_0':>8}{'to exact':>10}{'growth':>8}{'kept':>7}")
    for kind, (name, method) in itertools.product(ERRORS, METHODS.items()):
        path, kept = flow.sample(flow.spoiled(kind, options.error), method)
        curve = curves[kind][name] = growth(path, ideal["uncorrected"])
        print(
            f"{kind:<10}{name:<13}{curve[-1]:>8.4f}{flow.missed(path):>10.4f}"
            f"{amplification(ideal[name]):>8.3f}{kept:>7.3f}"
        )
    draw(curves, options.out)


def describe(flow: Flow, ideal: Tensor) -> None:
    """How an uncorrected run treats errors: its Jacobian is diagonal, x_{t-1} / x_t."""
    factors = (ideal[1:] / ideal[:-1]).abs().flatten(1).amax(dim=1)
    print(
        f"DDIM, {len(factors)} steps, {float(flow.missed(ideal)):.4f} from the exact flow; ‖A + B J‖ > 1 at "
        f"{int((factors > 1).sum())} of them, {factors.max():.4f} at most, product over all "
        f"{factors.prod():.2f}, norm of the product {amplification(ideal):.3f}"
    )


def growth(path: Tensor, ideal: Tensor) -> Tensor:
    """δ at every step `(T,)`, of paths `(T + 1, B, 1, H, W)` that begin alike."""
    return (path - ideal)[1:].square().flatten(1).mean(dim=1).sqrt()


def amplification(path: Tensor) -> float:
    """Spectral norm of the whole run's Jacobian, which is diagonal on the ideal denoiser: x_0 / x_T."""
    return float((path[-1] / path[0]).abs().max())


class Flow:
    """The sampling problem: T steps of DDIM from the same noise."""

    def __init__(self, num_steps: int, num_samples: int) -> None:
        self.scheduler = DDIMScheduler(clip_sample=False)
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
        self.scheduler.alphas_cumprod = alphas
        self.scheduler.set_timesteps(num_steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        self.alpha = alphas[self.timesteps].sqrt()
        self.sigma = (1 - alphas[self.timesteps]).sqrt()
        self.s = DEVIATIONS.view(SIZE, SIZE)
        self.noise = torch.randn(
            num_samples, 1, SIZE, SIZE, dtype=torch.float64, generator=Generator().manual_seed(0)
        )

    def slope(self, step: int) -> Tensor:
        """ε / x, `(H, W)`."""
        a, b = self.alpha[step], self.sigma[step]
        return b / (a**2 * self.s**2 + b**2)

    def ideal(self, x: Tensor, step: int) -> Tensor:
        """The best prediction."""
        return self.slope(step) * x

    def spoiled(self, kind: str, size: float) -> Predict:
        """The ideal prediction with an error of root mean square `size`, or near it."""
        bias = torch.randn(
            len(self.timesteps), SIZE, SIZE, dtype=torch.float64, generator=Generator().manual_seed(1)
        )
        grid = size * math.sqrt(12)
        return {
            "none": self.ideal,
            "bias": lambda x, step: self.ideal(x, step) + size * bias[step],
            "slope": lambda x, step: (1 + size) * self.ideal(x, step) + size * bias[step],
            "rounding": lambda x, step: torch.round(self.ideal(x, step) / grid) * grid,
        }[kind]

    def sample(self, predict: Predict, method: IEC | None) -> tuple[Tensor, float]:
        """The path `(T + 1, B, 1, H, W)`, and how often the guard stepped in."""
        steps = len(self.timesteps)
        denoiser = ClosedForm(predict, tuple(map(float, self.timesteps)))
        unet = SteppedUNet(denoiser, SimpleNamespace(in_channels=1, sample_size=SIZE))
        pipe = PathPipeline(unet, self.scheduler)
        no_manifest = cast(Any, None)  # correction reads none of it
        deployed = DeployedPipeline(pipe, num_inference_steps=steps, manifest=no_manifest, report=[])
        corrected = wrap(deployed, Plan.none() if method is None else Plan(method))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the guard: it has a column of its own
            path = corrected(latents=self.noise)
        return path, corrected.stats.diverged / (steps * len(self.noise))

    def missed(self, path: Tensor) -> float:
        """Distance of the last sample from where the exact flow takes the noise."""
        a, b = self.alpha[0], self.sigma[0]
        exact = self.noise * self.s / (a**2 * self.s**2 + b**2).sqrt()
        return float((path[-1] - exact).square().mean().sqrt())


class PathPipeline(DiffusionPipeline):
    """Samples and returns every x_t on the way."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents: Tensor, num_inference_steps: int) -> Tensor:
        """The path `(T + 1, B, 1, H, W)`."""
        self.scheduler.set_timesteps(num_inference_steps)
        path = [latents]
        for t in self.scheduler.timesteps:
            prediction = self.unet(path[-1], t).sample
            path.append(self.scheduler.step(prediction, t, path[-1])[0])
        return torch.stack(path)


class ClosedForm:
    """A `Denoiser` without a network and without a cache."""

    def __init__(self, predict: Predict, timesteps: tuple[float, ...]) -> None:
        self.predict = predict
        self.schedule = CacheSchedule.uncached(len(timesteps))
        self.timesteps = timesteps

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        return self.predict(x, step), None

    def cached(
        self,
        x: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor,
        *,
        is_extrapolated: bool = False,
    ) -> Tensor:
        """There is no cached step."""
        raise NotImplementedError

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """One unit."""
        return 1.0


def draw(curves: dict[str, dict[str, Tensor]], out: Path) -> None:
    """A column for each error: above δ, below its part of the uncorrected one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplots(2, len(curves), sharex=True, sharey="row", height_ratios=(3, 2))
    # Okabe and Ito's hues, as in the report's plots; dashes tell the same a second time.
    styles = (("#000000", "-"), ("#0072b2", "--"), ("#009e73", "-."), ("#d55e00", ":"))
    for (above, below), (kind, by_method) in zip(panels.T, curves.items(), strict=True):
        plain = by_method["uncorrected"]
        for (name, curve), (color, dashes) in zip(by_method.items(), styles, strict=True):
            steps = range(1, len(curve) + 1)
            above.semilogy(steps, curve, color=color, linestyle=dashes, label=name)
            if plain[-1] > 0:
                below.plot(steps, curve / plain, color=color, linestyle=dashes)
        above.set_title(ERRORS[kind])
        below.set_xlabel("steps taken")
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    panels[0, 0].set_ylabel("δ, root mean square")
    panels[0, 0].set_ylim(1e-4, 1)
    panels[1, 0].set_ylabel("of the uncorrected run's")
    panels[1, 0].text(0.5, 0.5, "(uncorrected: 0)", ha="center", transform=panels[1, 0].transAxes)
    panels[0, 0].legend(fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
