"""A class label as a one-token context for cross attention."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["ClassEmbedder"]


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
        """Context `(B, 1, embedding_dim)` for labels `(B,)`, int64."""
        context: Tensor = self.embedding(class_labels)[:, None, :]
        return context
