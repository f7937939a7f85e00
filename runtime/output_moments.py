"""Moments of predictions and their errors, and the maps that follow from them.

    symbol   here        meaning
    z        rows of G   (ε̃, 1): the prediction of the artifact at one pixel, and a one, (C + 1,)
    δ                    what the teacher predicts there, less ε̃, (C,)
    w_n                  weight of image n: 1 / (e_n + median of e), e_n the mean of δ² over the image
    G        gram        Σ_n w_n Σ_pixels z zᵀ, (C + 1, C + 1)
    R        cross       Σ_n w_n Σ_pixels z δᵀ, (C + 1, C)
    θ                    G⁻¹ R: least squares; ε̂ = ε̃ + θᵀ z, so M = I + θ[:C]ᵀ and b = θ[C]
    K        groups      images are split into that many, each with moments of its own
    s        kept        of each coefficient in the basis where G is the identity: max(0, 1 - se² / θ²)

Errors are heavy-tailed over images, and a plain fit follows its worst images: hence the weights. A
coefficient carries the sampling error of the images that it was fitted to, which adds up over the steps just
as the mean error does that it removes. So each is shrunk by its standard error (se), which the delete-a-group
jackknife over the K groups gives, and a coefficient that is nothing but sampling error vanishes.

Memory does not grow with the number of images.

Sources: positive-part shrinkage after James and Stein (1961); jackknife after Quenouille and Tukey. The use
of both for the errors of a denoiser is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from errata.errors import ErrataError
from errata.runtime.output_map import CallMaps

GROUPS = 8
# Fewer groups say too little about their scatter: until then a call is left as it is.
_FEWEST_GROUPS = 4
# Added to G's diagonal, relative to its mean: predictions of several channels may be copies of each other.
_RIDGE = 1e-9
# Where artifact and teacher agree to this mean square, there is nothing to weigh.
_NO_ERROR = 1e-20


class OutputMoments:
    """Moments of every call, by group of images, in float64.

    Args:
        calls: denoiser calls of a run, T.
        channels: of a prediction, C.
    """

    def __init__(self, calls: int, channels: int) -> None:
        self._channels = channels
        size = (calls, GROUPS, channels + 1)
        self._gram = torch.zeros(*size, channels + 1, dtype=torch.float64)
        self._cross = torch.zeros(*size, channels, dtype=torch.float64)

    def add(self, call: int, prediction: Tensor, target: Tensor, images: Tensor) -> None:
        """Add one evaluation.

        Args:
            call: its index.
            prediction: of the artifact, `(B, C, H, W)`.
            target: of the teacher, likewise.
            images: index of the image that each row belongs to, `(B,)`, int64, on the CPU.

        Raises:
            ErrataError: a prediction or target is not finite.
        """
        tilde = _wide(prediction)
        z = torch.cat([tilde, torch.ones_like(tilde[:, :1])], dim=1)
        delta = _wide(target) - tilde
        error = delta.square().mean(dim=(1, 2))
        if not bool(error.isfinite().all()):
            at_fault = "artifact's" if not bool(tilde.isfinite().all()) else "teacher's"
            raise ErrataError(
                f"call {call}: the {at_fault} prediction is not finite for image {int(images[0])} or a later "
                "one of its batch; look at images of both first"
            )
        weight = 1 / (error + error.median()).clamp(min=_NO_ERROR) / z.shape[2]
        weighted = z * weight[:, None, None]
        groups = images % GROUPS
        self._gram[call].index_add_(0, groups, (weighted @ z.mT).cpu())
        self._cross[call].index_add_(0, groups, (weighted @ delta.mT).cpu())

    def state(self) -> dict[str, Tensor]:
        """Return everything that was added, for `restore`."""
        return {"gram": self._gram, "cross": self._cross}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the moments that `state` returned, in place of these."""
        self._gram, self._cross = state["gram"].clone(), state["cross"].clone()

    def seen(self) -> tuple[int, ...]:
        """Return the calls to which an evaluation was added."""
        return tuple(self._gram[:, :, -1, -1].any(dim=1).nonzero().flatten().tolist())

    def map_of(self, call: int, *, bias_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return matrix `(C, C)` and bias `(C,)` of a call, float32; the identity if too little was seen."""
        theta = self._theta(call, bias_only=bias_only)
        channels = self._channels
        matrix = torch.eye(channels, dtype=torch.float64) + theta[:channels].T
        return matrix.float(), theta[channels].float()

    def maps(self, *, bias_only: bool = False) -> CallMaps:
        """Return the maps of all calls; the identity for those of which too little was seen."""
        maps = [self.map_of(call, bias_only=bias_only) for call in range(len(self._gram))]
        return CallMaps(
            matrix=torch.stack([matrix for matrix, _ in maps]), bias=torch.stack([bias for _, bias in maps])
        )

    def _theta(self, call: int, *, bias_only: bool) -> Tensor:
        """Return the shrunk coefficients, `(C + 1, C)`."""
        gram, cross = self._gram[call], self._cross[call]
        nothing = torch.zeros_like(cross[0])
        is_used = gram[:, -1, -1] > 0
        groups = int(is_used.sum())
        if groups < _FEWEST_GROUPS:
            return nothing
        if bias_only:
            gram, cross = gram[:, -1:, -1:], cross[:, -1:]
        # In the basis where G is the identity, the coefficients do not share their sampling errors.
        total = _regular(gram.sum(0))
        root = torch.linalg.cholesky(total)
        theta = root.mT @ _solved(total, cross.sum(0))
        left_out = torch.stack(
            [
                root.mT @ _solved(_regular(gram.sum(0) - gram[group]), cross.sum(0) - cross[group])
                for group in is_used.nonzero().flatten().tolist()
            ]
        )
        variance = (left_out - left_out.mean(0)).square().sum(0) * (groups - 1) / groups
        kept = (1 - variance / theta.square().clamp(min=torch.finfo(theta.dtype).tiny)).clamp(min=0)
        shrunk = torch.linalg.solve_triangular(root.mT, theta * kept, upper=True)
        nothing[-len(shrunk) :] = shrunk
        return nothing


def _wide(prediction: Tensor) -> Tensor:
    """Return a prediction as `(B, C, H·W)`, float64; on the CPU where the device has no such type."""
    flat = prediction.flatten(2)
    return flat.cpu().double() if prediction.device.type == "mps" else flat.double()


def _regular(gram: Tensor) -> Tensor:
    size = len(gram)
    return gram + _RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)


def _solved(gram: Tensor, cross: Tensor) -> Tensor:
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
