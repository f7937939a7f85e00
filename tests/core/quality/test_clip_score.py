import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.clip_score import ClipScore

PROMPTS = ["a cat", "two dogs on a hill", "blue"]


@pytest.fixture
def images() -> Tensor:
    """Values of 8 bits, of another shape than the model's."""
    return torch.randint(256, (3, 3, 20, 26), dtype=torch.uint8) / 255


def torchmetrics_score(folder: Path, image: Tensor, prompt: str) -> float:
    transformers = importlib.import_module("transformers")
    base: Any = transformers.CLIPModel
    clip_score = importlib.import_module("torchmetrics.functional.multimodal").clip_score

    class Unwrapped(base):
        """torchmetrics 1.9 expects features where transformers 5 returns an object that holds them."""

        def get_image_features(self, *arguments: Any) -> Tensor:
            return super().get_image_features(*arguments).pooler_output

        def get_text_features(self, *arguments: Any) -> Tensor:
            return super().get_text_features(*arguments).pooler_output

    def load() -> tuple[Any, Any]:
        return Unwrapped.from_pretrained(folder).eval(), transformers.CLIPProcessor.from_pretrained(folder)

    with torch.inference_mode():
        return float(clip_score((image * 255).round().to(torch.uint8), prompt, load))


def test_torchmetrics_gives_the_same(tiny_clip: Path, images: Tensor) -> None:
    scores = ClipScore(tiny_clip)(images, PROMPTS)
    expected = [torchmetrics_score(tiny_clip, *pair) for pair in zip(images, PROMPTS, strict=True)]
    assert scores.dtype == torch.float64
    assert min(expected) > 1
    assert scores.tolist() == pytest.approx(expected, rel=1e-3)
    others = ClipScore(tiny_clip)(images, PROMPTS[::-1])
    assert float(((others - scores).abs() / scores).max()) > 1e-2


def test_an_image_is_scored_alone_and_not_below_zero(tiny_clip: Path, images: Tensor) -> None:
    score = ClipScore(tiny_clip)
    together = score(images, PROMPTS)
    alone = torch.cat([score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert bool((score(images.repeat(9, 1, 1, 1), PROMPTS * 9) >= 0).all())


def test_grey_is_repeated_and_a_long_prompt_keeps_its_end(tiny_clip: Path, images: Tensor) -> None:
    score = ClipScore(tiny_clip)
    grey = images[:, :1]
    assert torch.equal(score(grey, PROMPTS), score(grey.repeat(1, 3, 1, 1), PROMPTS))
    long = "a very long prompt of more letters than the model takes"
    assert torch.equal(score(images, [long] * 3), score(images, [long + " and more"] * 3))


def test_what_does_not_fit_is_refused(
    tiny_clip: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = ClipScore(tiny_clip)
    with pytest.raises(ReportError, match="3 images have 2 prompts; .* needs one each"):
        score(images, PROMPTS[:2])
    with pytest.raises(ReportError, match=r"images have shape \(3, 2, 20, 26\)"):
        score(images[:, :2], PROMPTS)
    with pytest.raises(
        ReportError, match="cannot be loaded: .*; give a hub name such as openai/clip-vit-large"
    ):
        ClipScore(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ReportError, match=r"needs transformers .*pip install 'errata\[text\]'"):
        ClipScore(tiny_clip)
