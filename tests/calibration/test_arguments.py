"""What a calibration set keeps of the pipeline's arguments, for the stages after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline

from errata import calibration
from errata.calibration.arguments import ARGUMENTS
from errata.errors import CalibrationError

Guided = Callable[..., Any]
PROMPTS = ["a red house", "zwei Bäume", "🦊", "a lake"]
ASKED: dict[str, Any] = {"num_inference_steps": 3, "num_samples": 4, "batch_size": 2}


def test_prompts_are_kept(guided_pipeline: Guided, tmp_path: Path) -> None:
    recorded = calibration.calibrate(guided_pipeline(), tmp_path / "set", **ASKED, prompts=PROMPTS)
    found = calibration.load(tmp_path / "set").arguments()
    assert found == recorded.arguments()
    assert found is not None
    assert (found.prompts, found.inputs) == (tuple(PROMPTS), None)


def test_labels_and_texts_in_inputs_are_kept(guided_pipeline: Guided, tmp_path: Path) -> None:
    mappings = [{"prompt": PROMPTS[:2]}, {"prompt": PROMPTS[2:]}]
    recorded = calibration.calibrate(guided_pipeline(), tmp_path / "set", **ASKED, inputs=mappings)
    found = recorded.arguments()
    assert found is not None
    assert (found.prompts, found.inputs) == (None, tuple(mappings))


def test_tensors_are_not_kept(guided_pipeline: Guided, tmp_path: Path) -> None:
    """One batch of four has labels in a tensor, so the arguments are not complete."""
    mappings: list[dict[str, Any]] = [
        {"prompt": PROMPTS[:2]},
        {"class_labels": torch.tensor([0, 1]), "prompt": PROMPTS[2:]},
    ]
    recorded = calibration.calibrate(guided_pipeline(), tmp_path / "set", **ASKED, inputs=mappings)
    assert recorded.arguments() is None
    assert not (tmp_path / "set" / ARGUMENTS).exists()


def test_a_pipeline_that_needs_none_has_no_file(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    recorded = calibration.calibrate(tiny_pipeline, tmp_path / "set", **ASKED)
    found = recorded.arguments()
    assert found is not None
    assert (found.prompts, found.inputs) == (None, None)
    assert not (tmp_path / "set" / ARGUMENTS).exists()


def test_a_set_of_an_earlier_release_has_none(guided_pipeline: Guided, tmp_path: Path) -> None:
    recorded = calibration.calibrate(guided_pipeline(), tmp_path / "set", **ASKED, prompts=PROMPTS)
    (tmp_path / "set" / ARGUMENTS).unlink()
    assert recorded.arguments() is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"a lake", b"a lakE", "was altered"),
        (b'"inputs":null', b'"inputs":[{}]', "was altered"),
        (b'"prompts"', b'"prompt"', "is damaged"),
        (b"{", b"[", "is damaged"),
    ],
)
def test_altered_arguments_are_refused(
    old: bytes, new: bytes, reason: str, guided_pipeline: Guided, tmp_path: Path
) -> None:
    recorded = calibration.calibrate(guided_pipeline(), tmp_path / "set", **ASKED, prompts=PROMPTS)
    file = tmp_path / "set" / ARGUMENTS
    file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(CalibrationError, match=reason):
        recorded.arguments()
