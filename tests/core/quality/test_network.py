import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from errata.errors import ReportError
from errata.quality.network import (
    channels_of,
    dimension_of,
    has_logits,
    network_name,
    open_network,
)


class Promising(nn.Module):
    """Says its resolution and refuses it."""

    resolution = 7

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("too small")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    own = types.ModuleType("own_networks")
    own.ready = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())  # type: ignore[attr-defined]
    own.make = lambda: nn.Linear(2, 3)  # type: ignore[attr-defined]
    own.number = lambda: 3  # type: ignore[attr-defined]
    own.broken = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", own)
    return own


def test_the_embedded_network_is_known_by_name() -> None:
    network = open_network("digit-features")
    assert network_name(network) == "digit-features"
    assert (channels_of(network), dimension_of(network), has_logits(network)) == (1, 64, True)


def test_own_code_is_imported(module: types.ModuleType) -> None:
    ready = open_network("own_networks:ready")
    assert ready is module.ready
    assert not ready.training
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    assert network_name(ready) == "Sequential"
    assert (channels_of(ready), dimension_of(ready), has_logits(ready)) == (3, None, False)
    assert isinstance(open_network("own_networks:make"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_networks:number", "is a int; it must be an nn.Module, or return one"),
        ("own_networks:broken", "cannot be imported: ZeroDivisionError: .* must be importable from here"),
        ("own_networks:missing", "cannot be imported: AttributeError"),
        ("no_such_package.networks:make", "cannot be imported: ModuleNotFoundError"),
        ("resnet", 'feature network `resnet` is unknown; allowed are "digit-features", "inception"'),
        ("inception:", "feature network `inception:` is unknown"),
        ("some folder/file:make", "is unknown; allowed are"),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_is_no_network_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        open_network(spec)


def test_a_black_image_tells_the_dimension_where_the_resolution_is_known() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
    network.resolution = 5  # type: ignore[assignment]
    assert dimension_of(network) == 4 * 3 * 3
    with pytest.raises(ReportError, match="`Promising` fails on a black image of 7 pixels"):
        dimension_of(Promising())


def test_a_directory_holds_a_vision_model(tiny_clip: Path, tmp_path: Path) -> None:
    network = open_network(str(tiny_clip))
    images = torch.rand(2, 3, 20, 26)
    features = network(images)
    assert features.shape == (2, 8)
    assert network_name(network) == "tiny-clip"
    assert str(network.resizing).startswith("to 16x16")
    square = torch.rand(2, 3, 16, 16)
    mean, std = network.get_buffer("mean"), network.get_buffer("std")
    expected = network.get_submodule("model").get_image_features((square - mean) / std).pooler_output  # type: ignore[operator]
    torch.testing.assert_close(network(square), expected)
    with pytest.raises(ReportError, match="takes \\(B, 3, H, W\\)"):
        network(images[:, :1])
    with pytest.raises(
        ReportError, match="cannot be loaded: .* must hold a vision model and its image processor"
    ):
        open_network(str(tmp_path))


def test_a_dinov2_gives_its_pooled_token(tmp_path: Path) -> None:
    import transformers

    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **layers)).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(tmp_path)
    network, images = open_network(str(tmp_path)), torch.rand(2, 3, 28, 28)
    prepared = (images - network.get_buffer("mean")) / network.get_buffer("std")
    torch.testing.assert_close(network(images), model(prepared).last_hidden_state[:, 0])
