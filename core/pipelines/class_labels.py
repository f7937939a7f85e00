"""Class labels as they are given, checked and brought to one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Labels", "label_tensor"]

Labels = int | Sequence[int] | Tensor


def label_tensor(given: Labels, *, batch_size: int | None, num_labels: int, device: torch.device) -> Tensor:
    """Labels `(B,)`, int64, on `device`; a single one is repeated for the whole batch.

    Raises:
        ValueError: no whole numbers, one of them not in 0 to `num_labels - 1`, or not `batch_size` many.
    """
    labels = torch.as_tensor(given, device=device)
    if labels.numel() == 0:
        raise ValueError("class_labels are empty; give one label per sample")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool or labels.ndim > 1:
        raise ValueError(f"class_labels are {given!r}; they must be whole numbers, one per sample")
    labels = labels.long()
    if labels.ndim == 0:
        labels = labels.expand(batch_size or 1)
    if len(labels) != (batch_size or len(labels)):
        raise ValueError(
            f"{len(labels)} class_labels for batch_size={batch_size}; give one label per sample, or a single "
            "one for all"
        )
    for label in labels.tolist():
        if not 0 <= label < num_labels:
            raise ValueError(f"class label {label} is out of range; allowed are 0 to {num_labels - 1}")
    return labels
