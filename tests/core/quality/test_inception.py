import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.errors import ReportError
from errata.quality.inception import InceptionFeatures
from errata.quality.network import channels_of, dimension_of, has_logits, open_network
from errata.quality.pixels import to_bytes


class Opaque:
    """What a file of tensors must not hold."""


@pytest.fixture
def weights(torch_fidelity: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the layout that the extractor expects, at half their usual deviation."""
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    # The class loads weights when it is made; so take its own, before it would.
    with monkeypatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *arguments, **options: {})
        extractor = module.FeatureExtractorInceptionV3("random", ["2048"])
    file = tmp_path / "weights.pth"
    torch.save(extractor.state_dict(), file)
    return file


def test_features_scores_and_eight_bits(weights: Path) -> None:
    network = open_network(f"inception:{weights}")
    images = torch.rand(2, 3, 20, 24)
    features = network(images)
    assert features.shape == (2, 2048)
    assert (channels_of(network), dimension_of(network), has_logits(network)) == (3, 2048, True)
    assert isinstance(network, InceptionFeatures)
    # torch-fidelity itself, on the bytes of an image file.
    module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    extractor = module.FeatureExtractorInceptionV3(
        "both", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    pooled, logits = extractor((images * 255).round().to(torch.uint8))
    assert torch.equal(features, pooled)
    torch.testing.assert_close(network.logits(features), logits)
    assert network.logits(features.double()).shape == (2, 1008)
    cut_off = extractor((images * 255).to(torch.uint8))[0]
    assert not torch.equal(features, cut_off)
    with pytest.raises(ReportError, match=r"images have shape \(2, 1, 20, 24\); inception-v3 takes"):
        network(images[:, :1])


def test_bytes_are_rounded() -> None:
    levels = torch.arange(256) / 255
    assert to_bytes(levels).tolist() == list(range(256))
    assert to_bytes(torch.tensor([0.9999, 1.2, -0.1, 0.5 / 255 + 1e-4])).tolist() == [255, 255, 0, 1]


@pytest.mark.usefixtures("torch_fidelity")
def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="missing.pth` of Inception v3 does not exist"):
        open_network(f"inception:{tmp_path / 'missing.pth'}")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(ReportError, match="noise.pth` of Inception v3 is not a file of tensors"):
        open_network(f"inception:{tmp_path / 'noise.pth'}")
    torch.save({"fc.bias": Opaque()}, tmp_path / "code.pth")
    with pytest.raises(ReportError, match="code.pth` of Inception v3 is not a file of tensors"):
        open_network(f"inception:{tmp_path / 'code.pth'}")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ReportError, match="cannot be loaded from .*other.pth`: Error.*download `https://"):
        open_network(f"inception:{tmp_path / 'other.pth'}")


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ReportError, match=r"needs torch-fidelity and torchvision .*'errata\[metrics\]'"):
        open_network("inception")
