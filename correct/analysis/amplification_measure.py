"""How much each sampling step amplifies an error, and whether IEC's refinement contracts there.

The symbols, with the paper's equation numbers:

    symbol    here                meaning
    x_t       Probe.sample        where a run of the artifact itself passed
    J_t       norms.jacobian      ∂ε/∂x at x_t of a full evaluation, guided where the pipeline guides
    A_t, B_t  Probe.coefficients  the deterministic DDIM step x_{t-1} = A_t x_t + B_t ε(x_t, t) (Eq. 5, 6)
    δ_t       -                   an error of x_t becomes (A_t + B_t J_t) δ_t + B_t ε^δ (Eq. 8)
    λ         step_sizes          damping of IEC
    ∇G        -                   (1-λ) I + λ B_t J_t, the Jacobian of one refinement (Eq. 15)

Source: "Iterative Error Correction", section 3 and Fig. 1. Deviations: ∇G is taken at x_t, not at the
iterates near x_{t-1}, so that one Jacobian serves all. At a cached step J_t is that of the full network,
which is what a refinement would evaluate. Beside the mean over samples stand the smallest and the largest.

The norms are spectral; `errata.correct.analysis.measure` says how they are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.correct import steps as grammar
from errata.correct.analysis import figures
from errata.correct.analysis.measure import METHODS, Measure, Method
from errata.correct.analysis.probing import probes_of
from errata.correct.analysis.values import Values, require_whole
from errata.correct.analysis.watch import arguments_for
from errata.correct.sampling import Inputs, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """Made by `amplification`; norms of step i of `steps`, per sample.

    Attributes:
        steps: the denoiser calls that were measured.
        timesteps: their training times.
        coefficients: their A_t and B_t.
        propagation: ‖A_t + B_t J_t‖; above 1, a step can amplify an error.
        refinement: for each λ, ‖∇G‖; below 1, IEC with that λ contracts.
        method: "jacobian", "lanczos" or "arnoldi".
        difference: displacement of a coordinate in units of the sample's RMS.
        is_bound: the norms are lower bounds ("arnoldi", or "lanczos" without convergence).
    """

    steps: tuple[int, ...]
    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, float], ...]
    propagation: Values
    refinement: Mapping[float, Values]
    method: str
    difference: float
    is_bound: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        refinement = [
            {"step_size": step_size, "norms": values.to_json()}
            for step_size, values in self.refinement.items()
        ]
        return {
            "type": "Amplification",
            "version": 1,
            "steps": list(self.steps),
            "timesteps": list(self.timesteps),
            "coefficients": [list(pair) for pair in self.coefficients],
            "propagation": self.propagation.to_json(),
            "refinement": refinement,
            "method": self.method,
            "difference": self.difference,
            "is_bound": self.is_bound,
        }

    def plot(self, path: str | Path) -> Path:
        """Draws the two panels of the paper's Fig. 1 into `path`, whose ending chooses the format.

        Raises:
            ReportError: matplotlib is not installed, or the ending is none that it can write.
        """
        sign = " ≥" if self.is_bound else ""
        with figures.drawn(path, panels=2) as (left, right):
            figures.draw_band(left, self.steps, self.propagation)
            figures.label(left, "(a) one sampling step", f"‖A + B J‖{sign}")
            for (step_size, values), color in zip(
                self.refinement.items(), figures.ramp(len(self.refinement)), strict=True
            ):
                figures.draw_line(right, self.steps, values.mean, color=color, name=f"λ = {step_size:g}")
            figures.label(right, "(b) one refinement", f"‖∇G‖{sign}")
            for axes in (left, right):
                figures.draw_limit(axes, 1.0)
                axes.set_xlabel("denoiser call")
            figures.name_lines(right)
        return Path(path)


def amplification(
    deployed: DeployedPipeline,
    *,
    step_sizes: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 1.0),
    steps: str = "all",
    samples: int = 4,
    seed: int = 0,
    inputs: Inputs = default_inputs,
    method: Method = "auto",
    max_dimension: int = 1024,
    difference: float | None = None,
    iterations: int = 30,
    batch_size: int = 128,
) -> Amplification:
    """Measures ‖A_t + B_t J_t‖ and ‖∇G‖ along trajectories that `deployed` samples.

    Only `deployed.denoiser.full` is evaluated; "lanczos" also takes gradients of the network inside. With
    method "jacobian" a step takes 2 D full evaluations for a sample of D numbers.

    Args:
        deployed: a loaded artifact with a scheduler whose noise levels are known. It stays as it is.
        step_sizes: λ of each ∇G, above 0.
        steps: which denoiser calls, in the grammar of `Plan.steps`.
        samples: how many trajectories; all are sampled in one batch.
        seed: sample i starts from noise that depends on `seed + i` alone.
        inputs: keyword arguments of the pipeline for samples of given indices, such as prompts.
        method: "auto" chooses as `errata.correct.analysis.measure` says.
        max_dimension: most numbers of a sample for which "auto" forms the Jacobian.
        difference: displacement of a coordinate in units of the sample's RMS; None as
            `errata.correct.analysis.measure` says.
        iterations: most iterations of "lanczos" and "arnoldi".
        batch_size: most rows of one call of the network.

    Raises:
        PlanError: an argument is out of range; the scheduler's noise levels are not known; the pipeline does
            something between network and scheduler that is not understood; or method "lanczos" where
            gradients do not pass.
        ErrataError: the network returned NaN.
    """
    _check(step_sizes, method, difference)
    for name, count in {"samples": samples, "iterations": iterations, "batch_size": batch_size}.items():
        require_whole(name, count)
    chosen = frozenset(grammar.select(steps, deployed.schedule))
    arguments = arguments_for(deployed.pipe, range(samples), seed=seed, inputs=inputs)
    probes = probes_of(deployed, arguments, chosen, batch_size=batch_size)
    if not probes:
        raise PlanError(f"steps {steps!r} selects nothing to measure; write {grammar.GRAMMAR}")
    measure = Measure(
        deployed,
        probes[0],
        method=method,
        max_dimension=max_dimension,
        difference=difference,
        iterations=iterations,
        seed=seed,
    )
    rows: list[Tensor] = []
    for probe in probes:
        a, b = probe.coefficients()
        rows.append(measure(probe, [(a, b), *((1 - size, size * b) for size in step_sizes)]))
    norms = torch.stack(rows)  # (steps, B, 1 + step sizes)
    return Amplification(
        steps=tuple(probe.step for probe in probes),
        timesteps=tuple(deployed.denoiser.timesteps[probe.step] for probe in probes),
        coefficients=tuple(probe.coefficients() for probe in probes),
        propagation=_values(norms[..., 0]),
        refinement={float(size): _values(norms[..., 1 + i]) for i, size in enumerate(step_sizes)},
        method=measure.method,
        difference=measure.difference,
        is_bound=measure.is_bound,
    )


def _check(step_sizes: Sequence[float], method: str, difference: float | None) -> None:
    if not step_sizes or not all(0 < size < math.inf for size in step_sizes):
        raise PlanError(f"step_sizes={tuple(step_sizes)!r}: give one or more numbers above 0")
    if len(set(step_sizes)) != len(step_sizes):
        raise PlanError(f"step_sizes={tuple(step_sizes)!r} names one twice; leave it out")
    if method not in METHODS:
        raise PlanError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}")
    if difference is not None and not 0 < difference < math.inf:
        raise PlanError(f"difference={difference!r} must be above 0; leave it out for the default")


def _values(norms: Tensor) -> Values:
    return Values(tuple(tuple(row) for row in norms.tolist()))
