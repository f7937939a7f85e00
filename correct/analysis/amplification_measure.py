"""How much each sampling step amplifies an error, and whether IEC's refinement contracts there.

The symbols, with the paper's equation numbers:

    symbol    here                meaning
    x_t       Probe.sample        a sample of a run of the artifact itself
    J_t       probe.jacobian      ∂ε/∂x at x_t of a full evaluation, guided where the pipeline guides
    A_t, B_t  Probe.coefficients  the deterministic DDIM step x_{t-1} = A_t x_t + B_t ε(x_t, t) (Eq. 5, 6)
    δ_t       -                   an error of x_t becomes (A_t + B_t J_t) δ_t + B_t ε^δ (Eq. 8)
    λ         step_sizes          damping of IEC
    ∇G        -                   (1-λ) I + λ B_t J_t, the Jacobian of one refinement (Eq. 15)

Source: "Iterative Error Correction", section 3 and Fig. 1. Deviations: ∇G is taken at x_t, not at the
iterates near x_{t-1}, so that one Jacobian serves all. At a cached step J_t is that of the full network,
which is what a refinement would evaluate. Besides the mean over samples there are the smallest and largest.

The norms are spectral. This is how they are measured.

**Method.** Up to `max_dimension` numbers a sample, "auto" forms J column by column by central differences,
and the norms are exact singular values ("jacobian"). Above that, it probes an artifact without quantizers
with gradients ("lanczos"), which converges to the norm from below, and any other by differences alone
("arnoldi"), which gives a lower bound. `errata.correct.analysis.probe` describes all three.

**Displacement.** A quantized network is a staircase: its derivative is zero almost everywhere, so a
difference has to span several steps. On the embedded digits model (W8A8, 100 steps, one sample), with one
coordinate displaced by that many times the sample's RMS, ‖A + B J‖ comes to

    call    float network, gradients    0.03    0.1     0.3     1.0
    0       1.005                       1.274   1.060   1.024   1.042
    50      1.034                       1.126   1.049   1.037   1.034
    85      1.044                       1.136   1.052   1.047   1.044
    95      1.088                       1.184   1.101   1.090   1.134
    98      1.173                       1.483   1.180   1.121   1.323
    99      1.057                       1.660   1.094   1.079   1.132

Rounding adds to the norm. Too long a displacement smooths over the network's own noise level, which shrinks
to 0.05 and 0.01 at the last two calls, or leaves the range of the codes. 0.3 stays within 2 % of the float
network up to call 95, and within 5 % after it. So a norm of 1.02 of a quantized network cannot be told from
1.00 (`benchmarks/amplification.py --smooth` prints such a table). A float
network is displaced by 0.003, where differences agree with gradients to 1e-3, and to 1e-4 before the
last call. Directions of "lanczos" and "arnoldi" move all coordinates, each by 0.1 (quantized) or 0.001 of
the RMS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from errata.correct import steps as grammar
from errata.correct.analysis import figures
from errata.correct.analysis.probe import (
    Pair,
    Probe,
    arnoldi_norms,
    check_gradients,
    jacobian_norms,
    lanczos_norms,
)
from errata.correct.analysis.values import Values, require_whole
from errata.correct.analysis.watch import arguments_for, probes_of
from errata.correct.sampling import Inputs, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.denoiser import UNetDenoiser

Method = Literal["auto", "jacobian", "lanczos", "arnoldi"]
METHODS = ("auto", "jacobian", "lanczos", "arnoldi")

# In units of the sample's RMS, for a network that is smooth and for one that rounds; see above.
_ONE_COORDINATE = {"smooth": 0.003, "rounding": 0.3}
_ALL_COORDINATES = {"smooth": 0.001, "rounding": 0.1}


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
        """Return a plain JSON value."""
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
        """Plot the two panels of the paper's Fig. 1 into `path`, whose suffix chooses the format.

        Raises:
            ReportError: matplotlib is not installed, or cannot write that format.
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
    """Return ‖A_t + B_t J_t‖ and ‖∇G‖, measured along trajectories that `deployed` samples.

    Only `deployed.denoiser.full` is evaluated; "lanczos" also takes gradients of the network inside. With
    method "jacobian" a step takes 2 D full evaluations for a sample of D numbers.

    Args:
        deployed: a loaded artifact with a scheduler whose noise levels are known. It stays as it is.
        step_sizes: λ of each ∇G, above 0.
        steps: which denoiser calls, in the grammar of `Plan.steps`.
        samples: number of trajectories; all are sampled in one batch.
        seed: sample i starts from noise that depends on `seed + i` alone.
        inputs: keyword arguments of the pipeline for samples of given indices, such as prompts.
        method: "auto" chooses as described above.
        max_dimension: most numbers of a sample for which "auto" forms the Jacobian.
        difference: displacement of a coordinate in units of the sample's RMS; None chooses as described
            above.
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
        raise PlanError(f"step_sizes={tuple(step_sizes)!r} has a number twice; leave it out once")
    if method not in METHODS:
        raise PlanError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}")
    if difference is not None and not 0 < difference < math.inf:
        raise PlanError(f"difference={difference!r} must be above 0; leave it out for the default")


def _values(norms: Tensor) -> Values:
    return Values(tuple(tuple(row) for row in norms.tolist()))


class Measure:
    """Measures norms of the probes of one artifact by one method.

    Args:
        deployed: the artifact.
        probe: one of its probes, to choose the method by.
        method: one of `METHODS`.
        max_dimension: most numbers of a sample for which "auto" forms the Jacobian.
        difference: displacement of a coordinate in units of the sample's RMS; None as described above.
        iterations: most iterations of "lanczos" and "arnoldi".
        seed: of their first directions.

    Attributes:
        method: that was chosen.
        difference: likewise.
        is_bound: what was measured so far are lower bounds.

    Raises:
        PlanError: method "lanczos" where gradients do not pass.
    """

    def __init__(
        self,
        deployed: DeployedPipeline,
        probe: Probe,
        *,
        method: Method,
        max_dimension: int,
        difference: float | None,
        iterations: int,
        seed: int,
    ) -> None:
        self.method = _choose(method, probe.dimension <= max_dimension, _passes_gradients(deployed))
        rounds = bool(deployed.backend_report()) or probe.calls[0].sample.dtype.itemsize < 4
        defaults = _ONE_COORDINATE if self.method == "jacobian" else _ALL_COORDINATES
        self.difference = defaults["rounding" if rounds else "smooth"] if difference is None else difference
        self.is_bound = self.method == "arnoldi"
        self._iterations = iterations
        self._generator = torch.Generator().manual_seed(seed)
        if self.method == "lanczos":
            check_gradients(probe, self._size(probe), self._generator)

    def __call__(self, probe: Probe, pairs: Sequence[Pair]) -> Tensor:
        """Return the norms `(B, pairs)` of s I + f J for each pair (s, f)."""
        size, iterations, generator = self._size(probe), self._iterations, self._generator
        if self.method == "jacobian":
            return jacobian_norms(probe, pairs, size)
        if self.method == "arnoldi":
            return arnoldi_norms(probe, pairs, size, iterations=iterations, generator=generator)
        norms, has_converged = lanczos_norms(probe, pairs, size, iterations=iterations, generator=generator)
        self.is_bound |= not has_converged
        return norms

    def _size(self, probe: Probe) -> Tensor:
        """Return the length of the displacement of each sample, `(B,)`."""
        coordinates = 1 if self.method == "jacobian" else probe.dimension
        return self.difference * probe.rms * math.sqrt(coordinates)


def _choose(method: Method, is_small: bool, passes_gradients: bool) -> str:
    if method == "auto":
        return "jacobian" if is_small else "lanczos" if passes_gradients else "arnoldi"
    if method == "lanczos" and not passes_gradients:
        raise PlanError(
            'method "lanczos" needs gradients, and this artifact has quantized layers or no network; use '
            'method "arnoldi" for a lower bound, or "jacobian"'
        )
    return method


def _passes_gradients(deployed: DeployedPipeline) -> bool:
    return isinstance(deployed.denoiser, UNetDenoiser) and not deployed.backend_report()
