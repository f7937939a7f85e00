"""What the tests of feature networks share: torch-fidelity without torchvision, a tiny CLIP, a random
network."""

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Where scripts/set_up.sh puts what it installs without its dependencies.
WITHOUT_DEPENDENCIES = Path(sys.prefix) / "without-dependencies"

# What torch-fidelity names at import time; no test runs any of it.
_TORCHVISION = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": (),
}


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The real torch-fidelity; torchvision, which it imports and some indexes lack, is a stub."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(WITHOUT_DEPENDENCIES)
    if "torchvision" not in before:
        for name, attributes in _TORCHVISION.items():
            stub = types.ModuleType(name)
            for attribute in attributes:
                setattr(stub, attribute, type(attribute, (), {}))
            monkeypatch.setitem(sys.modules, name, stub)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stub)
    yield pytest.importorskip(
        "torch_fidelity", reason="torch-fidelity is not installed", exc_type=ImportError
    )
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "torch_fidelity":  # imported with the stub, so of no use to others
            del sys.modules[name]


class RandomFeatures(nn.Module):
    """A small convolutional network with random weights, as every metric here takes one."""

    name = "random-features"
    channels = 3
    resolution = 12
    dimension = num_features = 24  # torchmetrics reads the latter

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2),
            nn.Tanh(),
            nn.Conv2d(16, 24, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        return 3 * self.body(4 * images - 2)

    def logits(self, features: Tensor) -> Tensor:
        return 6 * self.head(features)


@pytest.fixture
def random_features() -> RandomFeatures:
    """In double precision, so that comparisons show formulas and not rounding."""
    torch.manual_seed(11)
    return RandomFeatures().double().eval().requires_grad_(False)


def save_tiny_clip(folder: Path) -> None:
    """A CLIP of random weights, with a tokenizer of letters and an image processor of 16 pixels."""
    transformers = importlib.import_module("transformers")
    processing: Any = importlib.import_module("transformers.models.clip.image_processing_pil_clip")
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    last = len(tokens) - 1
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 20, "bos_token_id": last - 1}
    config = transformers.CLIPConfig(
        text_config={**layers, **text, "eos_token_id": last, "pad_token_id": last},
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)  # all cosines of the prompts in these tests are positive
        transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    processing.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    save_tiny_clip(folder)
    return folder
