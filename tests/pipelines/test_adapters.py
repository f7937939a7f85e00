"""LoRA: what is not part of the weights yet is refused; what is, is compressed with them."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import CalibrationError, calibration, compress, deploy

peft = pytest.importorskip("peft")
STEPS = 3
LAYERS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


@pytest.fixture
def make_adapted(small_pipeline: Callable[[str], Any]) -> Callable[[str], Any]:
    """A copy of the Stable Diffusion pipeline with an adapter, of random weights, on one component."""

    def make(component: str) -> Any:
        small = copy.copy(small_pipeline("sd 1"))
        pipe = copy.copy(small.pipe)
        setattr(pipe, component, copy.deepcopy(getattr(pipe, component)))
        config = peft.LoraConfig(r=4, target_modules=LAYERS[component], init_lora_weights=False)
        getattr(pipe, component).add_adapter(config)
        return type(small)(pipe, small.inputs)

    return make


@pytest.mark.parametrize("component", LAYERS)
def test_an_adapter_beside_the_weights_is_refused(
    component: str, make_adapted: Callable[[str], Any], tmp_path: Path
) -> None:
    message = (
        rf"`{component}\..*` has LoRA layers next to its weight; fuse them first: `pipe.fuse_lora\(\); pipe"
    )
    with pytest.raises(CalibrationError, match=message):
        make_adapted(component).collect(tmp_path / "set", steps=STEPS)
    assert list(tmp_path.iterdir()) == []


def test_a_fused_adapter_is_compressed_with_the_weights(
    small_pipeline: Callable[[str], Any], make_adapted: Callable[[str], Any], tmp_path: Path
) -> None:
    plain, small = small_pipeline("sd 1"), make_adapted("unet")
    small.pipe.fuse_lora()
    small.pipe.unload_lora_weights()
    compressed = compress.apply(
        small.pipe, small.collect(tmp_path / "set", steps=STEPS), "w8a8", tmp_path / "compressed"
    )
    deployed = deploy.load(deploy.export(compressed, tmp_path / "artifact"))
    deployed.pipe.set_progress_bar_config(disable=True)
    adapted, without = (
        each.draw(functools.partial(each.pipe, num_inference_steps=STEPS), 0) for each in (small, plain)
    )
    found = small.draw(deployed, 0)
    assert torch.isfinite(found).all()
    assert (found - adapted).square().mean() < 0.1 * (found - without).square().mean()


def test_a_stored_pipeline_with_an_adapter_is_refused_by_name(
    make_adapted: Callable[[str], Any], tmp_path: Path
) -> None:
    make_adapted("unet").pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(CalibrationError, match=r"unet/.*safetensors` has LoRA layers .*fuse_lora"):
        calibration.load_pipeline(tmp_path / "saved")
