"""A float pipeline is opened: what is wrong with it is said before diffusers says it in many lines."""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError, safe_open
from torch import nn

from errata.errors import CalibrationError
from errata.large_weights import compute_in_float32_
from errata.pipelines import PIPELINES

__all__ = ["in_one_line", "load_pipeline"]

# A hub name is `name` or `owner/name`: https://huggingface.co/docs/hub/repositories
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# By the names of safetensors.
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def load_pipeline(source: str | Path) -> DiffusionPipeline:
    """Open a float pipeline, on the CPU, so that it computes in float32, in whichever type it was saved.

    A component that was saved in half precision keeps its large weights so: their layers convert them when
    they run, with the results of a component that was converted as a whole (`errata.large_weights`).

    Args:
        source: a hub name, or a directory as `save_pretrained` of a diffusers pipeline, or of one of
            `errata.pipelines`, writes it; its weights must be in safetensors. A directory of that name wins
            over a hub name.

    Raises:
        CalibrationError: no such pipeline, one without a UNet, damaged files, pickled weights, code of its
            own, or a hub that cannot be reached.
    """
    name, directory = str(source), Path(source).expanduser()
    pipeline_class = DiffusionPipeline
    if directory.exists():
        index = _check_directory(directory)
        # Diffusers would look for the class in its own package; of ours only those named there are opened.
        pipeline_class = PIPELINES.get(index["_class_name"], DiffusionPipeline)
        _check_stored_adapters(directory)
        name = str(directory)
    elif not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CalibrationError(
            f"`{source}` does not exist; give a diffusers directory (one with model_index.json) or a hub name"
        )
    try:
        if not directory.exists():
            name = str(DiffusionPipeline.download(name, use_safetensors=True))
        pipe = _open(pipeline_class, name, _half_precision(Path(name)))
    except Exception as problem:  # diffusers, transformers, safetensors and the hub raise whatever they like
        raise CalibrationError(_why_not_opened(source, directory, problem)) from problem
    if getattr(pipe, "unet", None) is None:
        raise CalibrationError(
            f"`{source}` is a {type(pipe).__name__}, which has no unet; choose a pipeline with one"
        )
    return pipe


def _open(
    pipeline_class: type[DiffusionPipeline], name: str, halves: Mapping[str, torch.dtype]
) -> DiffusionPipeline:
    """Open the components named in `halves` in that type, then let them compute in float32; others in it."""
    pipe = pipeline_class.from_pretrained(
        name,
        use_safetensors=True,
        dtype={"default": torch.float32, **halves},
        low_cpu_mem_usage=is_accelerate_available(),  # else diffusers 0.42 recommends it, once a model
    )
    components = {key: pipe.components.get(key) for key in halves}
    components = {key: value for key, value in components.items() if isinstance(value, nn.Module)}
    if made := [key for key, component in components.items() if _makes_buffers(component)]:
        return _open(pipeline_class, name, {key: dtype for key, dtype in halves.items() if key not in made})
    for component in components.values():
        compute_in_float32_(component)
    return pipe


def _makes_buffers(component: nn.Module) -> bool:
    """Return whether it has floating-point buffers that are in no file: made in half, they are rounded."""
    stored = component.state_dict().keys()
    return any(value.is_floating_point() for name, value in component.named_buffers() if name not in stored)


def _half_precision(directory: Path) -> dict[str, torch.dtype]:
    """Return the components all of whose weights are stored in one half-precision type, with that type."""
    types: dict[str, set[str]] = {}
    for file in sorted(directory.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # damaged; opening the pipeline says so
        types.setdefault(file.parent.name, set()).update(found)
    return {
        name: _HALVES[next(iter(found))]
        for name, found in types.items()
        if len(found) == 1 and found <= _HALVES.keys()
    }


def _check_directory(directory: Path) -> dict[str, Any]:
    """Say what is wrong with a directory before diffusers says it in many lines; returns its index."""
    expected = "give a diffusers directory, as `pipe.save_pretrained(...)` writes it"
    index = directory / "model_index.json"
    if not directory.is_dir():
        raise CalibrationError(f"`{directory}` is not a directory; {expected}")
    if not index.is_file():
        raise CalibrationError(f"`{directory}` is not a pipeline: it has no model_index.json; {expected}")
    try:
        components = json.loads(index.read_bytes())
    except (OSError, ValueError) as problem:
        raise CalibrationError(f"`{index}` is not valid JSON ({problem}); {expected}") from problem
    if not isinstance(components, dict) or not isinstance(components.get("_class_name"), str):
        raise CalibrationError(f"`{index}` does not name a pipeline class; {expected}")
    if not any(components.get("unet") or ()):
        raise CalibrationError(
            f"`{directory}` has no unet in its model_index.json; choose a pipeline with one"
        )
    for name, value in components.items():
        if isinstance(value, list):
            _check_no_pickles(directory / name)
    if not any((directory / "unet").glob("*.safetensors")):
        raise CalibrationError(
            f"`{directory / 'unet'}` has no safetensors weights; copy the pipeline again or save it with "
            "safe_serialization=True"
        )
    return components


def _check_no_pickles(folder: Path) -> None:
    pickled = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise CalibrationError(
            f"`{folder}` has its weights only as a pickle (`{pickled[0]}`), which runs code when opened; "
            "convert them: `pipe.save_pretrained(..., safe_serialization=True)`"
        )


def _check_stored_adapters(directory: Path) -> None:
    """Check that no weights lie beside adapters: diffusers would leave them out and warn at length."""
    for file in sorted(directory.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                names = list(weights.keys())
        except (OSError, SafetensorError):
            continue  # damaged; opening the pipeline says so
        if adapted := next((name for name in names if ".base_layer." in name or "lora_" in name), None):
            raise CalibrationError(
                f"`{file}` has LoRA layers next to its weights (`{adapted}`); save the pipeline again after "
                "`pipe.fuse_lora(); pipe.unload_lora_weights()`"
            )


def _why_not_opened(source: str | Path, directory: Path, problem: Exception) -> str:
    reason = in_one_line(problem).rstrip(".")
    if directory.exists():
        return f"`{source}` cannot be opened as a pipeline: {reason}; copy it again or save it again"
    return (
        f"`{source}` is no local directory, and cannot be fetched from the hub: {reason}; check the name and "
        "the connection"
    )


def in_one_line(problem: Exception) -> str:
    """Return the first line of what an exception says, cut to 200 characters."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 200, placeholder=" …") if lines else type(problem).__name__
