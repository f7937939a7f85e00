"""LPIPS: how different two images look to a network that was trained to agree with people.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", with the
paper's linear weights (v0.1) as torchmetrics ships them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality.paired import require_same_shape

Backbone = Literal["alex", "vgg", "squeeze"]


class Lpips:
    """`Lpips()(images, reference)`: the perceptual distance of each pair, (B,); 0 for equal images."""

    def __init__(
        self,
        *,
        backbone: Backbone = "alex",
        network: nn.Module | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load the network; its backbone is downloaded once by torchvision.

        backbone: "alex" is what papers report, "vgg" what the authors advise as a loss.
        network: used in its place: maps two batches (B, 3, H, W) in [-1, 1] to distances, B numbers.

        Raises:
            ReportError: torchmetrics or torchvision is missing, or the backbone cannot be had.
        """
        self.name = f"LPIPS ({backbone})" if network is None else f"LPIPS ({type(network).__name__})"
        self._network = network if network is not None else _pretrained(backbone)
        self._network.eval().requires_grad_(False)
        self._device = torch.device(device or "cpu")
        self._network.to(self._device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,), float64 on the CPU.

        images, reference: (B, C, H, W) in [0, 1], C 1 or 3; grey is repeated. Networks need some 32 pixels.

        Raises:
            ReportError: another number of channels, or the network refuses the images.
            ValueError: the shapes differ.
        """
        require_same_shape(images, reference)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ReportError(f"images have shape {tuple(images.shape)}; {self.name} takes (B, 1 or 3, H, W)")
        pair = [self._prepared(batch) for batch in (images, reference)]
        try:
            distances = self._network(*pair)
        except (RuntimeError, ValueError) as problem:
            raise ReportError(
                f"{self.name} refuses images of shape {tuple(images.shape)}: {problem}; its networks need "
                "images of at least about 32 pixels"
            ) from problem
        if distances.numel() != len(images):
            raise ReportError(
                f"{self.name} gives distances of shape {tuple(distances.shape)} for {len(images)} pairs; the "
                "network must give one number a pair"
            )
        return distances.reshape(-1).double().cpu()

    def _prepared(self, images: Tensor) -> Tensor:
        return 2 * images.to(self._device, torch.float32).expand(-1, 3, -1, -1) - 1


def _pretrained(backbone: str) -> nn.Module:
    try:
        import torchvision  # noqa: F401
        from torchmetrics.functional.image.lpips import _NoTrainLpips
    except ImportError as problem:
        raise ReportError(
            f"LPIPS needs torchmetrics and torchvision ({problem}); install them with "
            "`pip install 'errata[metrics]'`, or give a network"
        ) from problem
    try:
        return _NoTrainLpips(net=backbone)
    except OSError as problem:
        raise ReportError(
            f"the backbone `{backbone}` of LPIPS cannot be downloaded: {problem}; run once with a network "
            "connection, or put torchvision's weights into $TORCH_HOME/hub/checkpoints"
        ) from problem
