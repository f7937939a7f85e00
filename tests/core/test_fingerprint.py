"""Digests tell apart what differs, and only that."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image

from errata import CalibrationError, calibration
from errata.fingerprint import value_digest


def test_the_fingerprint_sees_weights_dtype_and_configuration(tiny_pipeline: DDIMPipeline) -> None:
    unet = tiny_pipeline.unet
    original = calibration.model_fingerprint(unet)
    assert original == calibration.model_fingerprint(copy.deepcopy(unet))
    nudged = copy.deepcopy(unet)
    with torch.no_grad():
        last = nudged.conv_out.weight.view(-1)[-1:]
        last.copy_(torch.nextafter(last, torch.tensor(9.0)))
    configured = copy.deepcopy(unet)
    configured.register_to_config(center_input_sample=True)
    half = copy.deepcopy(unet).half()
    swapped = copy.deepcopy(unet)
    with torch.no_grad():
        first, second = swapped.down_blocks[0].resnets
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            a.data, b.data = b.data, a.data
    prints = {calibration.model_fingerprint(model) for model in (unet, nudged, configured, half, swapped)}
    assert len(prints) == 5


def test_the_fingerprint_does_not_see_where_a_model_lives(
    tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    moved = calibration.load_pipeline(tmp_path / "pipeline").unet
    assert moved.config["_name_or_path"] != tiny_pipeline.unet.config.get("_name_or_path")
    assert calibration.model_fingerprint(moved) == calibration.model_fingerprint(tiny_pipeline.unet)


VALUES: list[Any] = [
    None,
    0,
    0.0,
    False,
    "",
    "0",
    b"0",
    [],
    {},
    [[], []],
    [[[]]],
    ["a", "b"],
    ["ab"],
    {"a": 1},
    {"a": "1"},
    {"b": 1},
    torch.zeros(2),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.tensor([0.0, -0.0]),
    torch.zeros(0),
    torch.tensor(0.0, dtype=torch.bfloat16),
    np.zeros(2),
    np.float32(0),
    Image.new("L", (2, 2)),
    Image.new("L", (4, 1)),
    Image.new("L", (2, 2), 1),
    Image.new("RGB", (2, 2)),
    torch.float16,
    torch.device("cpu"),
    Path("0"),
]


def test_values_that_differ_have_digests_that_differ() -> None:
    digests = [value_digest(value, name="x") for value in VALUES]
    assert len(set(digests)) == len(VALUES)
    assert digests == [value_digest(copy.deepcopy(value), name="x") for value in VALUES]


def test_the_order_of_a_mapping_does_not_count() -> None:
    assert value_digest({"a": 1, "b": 2}, name="x") == value_digest({"b": 2, "a": 1}, name="x")
    assert value_digest([1, 2], name="x") != value_digest([2, 1], name="x")


def test_what_has_no_content_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"`inputs\[0\].callback` is a function, whose content cannot be compared"
    ):
        value_digest([{"callback": lambda: None}], name="inputs")
    with pytest.raises(CalibrationError, match="`x` is a ndarray, whose content cannot be compared"):
        value_digest(np.array([object()]), name="x")
