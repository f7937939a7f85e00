"""Class labels: checked and brought to one tensor, and as a one-token context for cross attention."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["ClassEmbedder", "Labels", "label_tensor"]

Labels = int | Sequence[int] | Tensor


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One learned vector for each class, and a last one for "no class".

    Args:
        num_classes: classes that can be asked for; the table has one row more.
        embedding_dim: width of the context, the UNet's `cross_attention_dim`.

    Source: latent diffusion's `ClassEmbedder`; the ImageNet model `cin256-v2` has 1000 classes of width 512,
    and class 1000 was seen in training wherever the label was dropped.
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embedding_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embedding_dim)

    @property
    def num_labels(self) -> int:
        """Labels that `forward` takes, "no class" among them."""
        return self.embedding.num_embeddings

    @property
    def unconditional_label(self) -> int:
        """The label of "no class": the last row."""
        return self.num_labels - 1

    def forward(self, class_labels: Tensor) -> Tensor:
        """Return the context `(B, 1, embedding_dim)` for labels `(B,)`, int64."""
        context: Tensor = self.embedding(class_labels)[:, None, :]
        return context


def label_tensor(given: Labels, *, batch_size: int | None, num_labels: int, device: torch.device) -> Tensor:
    """Return labels `(B,)`, int64, on `device`; a single one is repeated for the whole batch.

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
