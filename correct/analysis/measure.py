"""Which method measures the norms of a probe, and how far it displaces a sample.

**Method.** Up to `max_dimension` numbers a sample, "auto" forms J column by column by central differences,
and the norms are exact singular values ("jacobian"). Above that, it probes an artifact without quantizers
with gradients ("lanczos"), which converges to the norm from below, and any other by differences alone
("arnoldi"), which gives a lower bound. `errata.correct.analysis.norms` describes all three.

**Displacement.** A quantized network is a staircase: its derivative is zero almost everywhere, and a
difference has to bridge the steps. On the embedded digits model (W8A8, 100 steps, one sample), one coordinate
displaced by that many times the sample's RMS, ‖A + B J‖ comes to

    call    float network, gradients    0.03    0.1     0.3     1.0
    0       1.005                       1.274   1.060   1.024   1.042
    50      1.034                       1.126   1.049   1.037   1.034
    85      1.044                       1.136   1.052   1.047   1.044
    95      1.088                       1.184   1.101   1.090   1.134
    98      1.173                       1.483   1.180   1.121   1.323
    99      1.057                       1.660   1.094   1.079   1.132

Rounding adds to the norm; too long a displacement smooths over what the network does within its own noise
level, which shrinks to 0.05 and 0.01 at the last two calls, or leaves the range of the codes. 0.3 stays
within 2 % of the float network up to call 95, and within 5 % after it. So a norm of 1.02 of a quantized
network is not to be told from 1.00 (`benchmarks/amplification.py --smooth` prints such a table). A float
network is displaced by 0.003, where differences agree with gradients to 1e-3, and to 1e-4 before the
last call. Directions of "lanczos" and "arnoldi" move all coordinates, each by 0.1 (quantized) or 0.001 of
the RMS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from errata.correct.analysis.norms import (
    Pair,
    arnoldi_norms,
    check_gradients,
    jacobian_norms,
    lanczos_norms,
)
from errata.correct.analysis.probe import Probe
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.denoiser import UNetDenoiser

Method = Literal["auto", "jacobian", "lanczos", "arnoldi"]
METHODS = ("auto", "jacobian", "lanczos", "arnoldi")

# In units of the sample's RMS, for a network that is smooth and for one that rounds; see above.
_ONE_COORDINATE = {"smooth": 0.003, "rounding": 0.3}
_ALL_COORDINATES = {"smooth": 0.001, "rounding": 0.1}


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
        """Norms `(B, pairs)` of s I + f J for each pair (s, f)."""
        size, iterations, generator = self._size(probe), self._iterations, self._generator
        if self.method == "jacobian":
            return jacobian_norms(probe, pairs, size)
        if self.method == "arnoldi":
            return arnoldi_norms(probe, pairs, size, iterations=iterations, generator=generator)
        norms, has_converged = lanczos_norms(probe, pairs, size, iterations=iterations, generator=generator)
        self.is_bound |= not has_converged
        return norms

    def _size(self, probe: Probe) -> Tensor:
        """Length of the displacement of each sample, `(B,)`."""
        coordinates = 1 if self.method == "jacobian" else probe.dimension
        return self.difference * probe.rms * math.sqrt(coordinates)


def _choose(method: Method, is_small: bool, passes_gradients: bool) -> str:
    if method == "auto":
        return "jacobian" if is_small else "lanczos" if passes_gradients else "arnoldi"
    if method == "lanczos" and not passes_gradients:
        raise PlanError(
            'method "lanczos" needs gradients, and this artifact has quantized layers, or no network inside; '
            'take method "arnoldi" for a lower bound, or "jacobian"'
        )
    return method


def _passes_gradients(deployed: DeployedPipeline) -> bool:
    return isinstance(deployed.denoiser, UNetDenoiser) and not deployed.backend_report()
