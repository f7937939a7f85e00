"""Distances between two images from the same noise: PSNR, SSIM and LPIPS.

LPIPS says how different two images look to a network that was trained to agree with people.

Source of LPIPS: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    with
the paper's linear weights (v0.1) as torchmetrics ships them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality.metric import Metric

Backbone = Literal["alex", "vgg", "squeeze"]

# Equal images have no finite PSNR; 1e-10 is 100 dB, and an error of one 8-bit level everywhere is 48 dB.
_SMALLEST_ERROR = 1e-10
# The window of Wang et al. 2004, in pixels: 11 wide, a Gaussian of 1.5.
_WINDOW = 11
_SIGMA = 1.5


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, (B,) float64, in dB; equal images give 100 dB.

    images, reference: (B, C, H, W), in [0, 1] (data range 1).

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=_SMALLEST_ERROR))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B,) float64; 1 for equal images.

    images, reference: (B, C, H, W), in [0, 1] (data range 1).

    The window is the usual one, 11 pixels of a Gaussian of 1.5. An image with a side below 11 pixels gets
    the largest odd window that fits, with the Gaussian narrowed in proportion; compare such figures only with
    each other.

    Raises:
        ReportError: torchmetrics is missing, or a side is below 3 pixels.
        ValueError: the shapes differ.

    Source: Wang et al. 2004, as torchmetrics computes it: at its borders an image is reflected.
    """
    check_same_shape(images, reference)
    window = ssim_window(min(images.shape[2:]))
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as problem:
        raise ReportError(
            f"SSIM needs torchmetrics ({problem}); install it with `pip install 'errata[report]'`"
        ) from problem
    # torchmetrics derives the window of a Gaussian from sigma and passes over kernel_size.
    similarity = structural_similarity_index_measure(
        images.double(),
        reference.double(),
        sigma=_SIGMA * window / _WINDOW,
        kernel_size=window,
        data_range=1.0,
        reduction="none",
    )
    return similarity.reshape(len(images))


def ssim_window(side: int) -> int:
    """Return the window, in pixels, for images whose shorter side is `side`.

    Raises:
        ReportError: below 3 pixels, where no window has a neighbourhood.
    """
    if side < 3:
        raise ReportError(f"images have a side of {side} pixels; SSIM needs at least 3")
    return min(_WINDOW, side if side % 2 else side - 1)


def check_same_shape(images: Tensor, reference: Tensor) -> None:
    """Check that images and references pair.

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, their references {tuple(reference.shape)}"
        )


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
        """Return distances (B,), float64 on the CPU.

        images, reference: (B, C, H, W) in [0, 1], C 1 or 3; grey is repeated. Networks need some 32 pixels.

        Raises:
            ReportError: another number of channels, or the network fails on the images.
            ValueError: the shapes differ.
        """
        check_same_shape(images, reference)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ReportError(f"images have shape {tuple(images.shape)}; {self.name} takes (B, 1 or 3, H, W)")
        pair = [self._prepared(batch) for batch in (images, reference)]
        try:
            distances = self._network(*pair)
        except (RuntimeError, ValueError) as problem:
            raise ReportError(
                f"{self.name} fails on images of shape {tuple(images.shape)}: {problem}; its networks need "
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


METRICS = (
    Metric(
        name="psnr",
        title="PSNR",
        unit="dB",
        decimals=1,
        higher_is_better=True,
        needs="pairs",
        compute=psnr,
        in_main_table=True,
        description="peak signal-to-noise ratio in dB, {pairs}",
    ),
    Metric(
        name="ssim",
        title="SSIM",
        higher_is_better=True,
        needs="pairs",
        compute=ssim,
        description="structural similarity, {pairs}",
    ),
    Metric(  # computed where a model is given: `Lpips`
        name="lpips",
        title="LPIPS",
        higher_is_better=False,
        needs="pairs",
        description="learned perceptual distance, {pairs}",
    ),
)
