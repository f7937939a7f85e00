"""A pipeline's components beside its denoiser: written to and read from safetensors and JSON only."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors.torch import load_file
from torch import nn

from errata.deploy.allowlist import is_tokenizer, is_transformers_model
from errata.deploy.component_files import FOREIGN_FORMAT, without_places
from errata.deploy.safetensors_header import read_header
from errata.deploy.strict_json import json_object
from errata.errors import ArtifactError
from errata.plain_json import from_plain, to_plain

# One file a model, whatever its size: an index beside several would name files.
_ONE_FILE = "100000GB"
_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
# A tokenizer's files.
_STATE_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
# What a call leaves behind in `tokenizer.json`, and as what it comes back in `tokenizer_config.json`.
_STATE = ("truncation", "padding")
_TRACES = (
    "is_local",
    "local_files_only",
    "max_length",
    "pad_to_multiple_of",
    "stride",
    "truncation_strategy",
)
_SIDES = ("padding_side", "truncation_side")


def write_component(component: Any, folder: Path) -> None:
    """Write a component into the new directory `folder`; its settings name no place of this machine.

    Raises:
        ArtifactError: its weights are in a format of their own.
    """
    options = {"safe_serialization": True, "max_shard_size": _ONE_FILE}
    component.save_pretrained(folder, **(options if isinstance(component, nn.Module) else {}))
    if is_tokenizer(type(component)):
        _forget_use(folder, component)
    for file in _settings_files(folder):
        settings = json.loads(file.read_bytes())
        if FOREIGN_FORMAT in settings:
            raise ArtifactError(
                f"component {folder.name!r} has a {FOREIGN_FORMAT}: load it in float16 or float32 instead"
            )
        write_json(file, without_places(settings))


def write_json(file: Path, value: Any) -> None:
    """Write JSON for people, sorted and indented; the infinities of some schedulers are spelled out."""
    text = json.dumps(to_plain(value), indent=2, sort_keys=True, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def load_component(folder: Path, kind: type[Any]) -> Any:
    """Return the component that `write_component` wrote, in its own floating types; disturbs no random state.

    Raises:
        Exception: whatever diffusers and transformers raise if the files do not make a `kind`.
    """
    with torch.random.fork_rng(devices=[]):
        if issubclass(kind, ModelMixin):
            return _diffusers_model(folder, kind)
        if is_transformers_model(kind):
            return _transformers_model(folder, kind)
    if issubclass(kind, ConfigMixin):  # a scheduler
        return kind.from_config(from_plain(json_object(folder / kind.config_name)))
    return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _diffusers_model(folder: Path, kind: type[Any]) -> nn.Module:
    model: nn.Module = kind.from_config(from_plain(json_object(folder / _CONFIG)))
    model.load_state_dict(load_file(folder / DIFFUSERS_WEIGHTS), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _transformers_model(folder: Path, kind: type[Any]) -> nn.Module:
    """Load with one type for the whole model, as transformers does; narrow a mixed one (T5's) afterwards."""
    stored = _float_types(folder / TRANSFORMERS_WEIGHTS)
    widest = functools.reduce(torch.promote_types, stored.values())
    model, told = kind.from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=widest,
        output_loading_info=True,
    )
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(trouble):
            raise ValueError(f"{folder.name} has {trouble.replace('_', ' ')}: {sorted(told[trouble])[0]}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != stored.get(name, parameter.dtype):
            parameter.data = parameter.data.to(stored[name])
    network: nn.Module = model
    return network.eval().requires_grad_(False)


def _float_types(file: Path) -> dict[str, torch.dtype]:
    tensors = read_header(file).tensors.items()
    return {name: tensor.dtype for name, tensor in tensors if tensor.dtype.is_floating_point}


def _settings_files(folder: Path) -> list[Path]:
    """Return the configurations; vocabularies are JSON too, but their keys are words."""
    return sorted(folder.glob(f"*{_CONFIG}"))


def _forget_use(folder: Path, tokenizer: Any) -> None:
    """Rewrite a tokenizer's files without traces of its use: the same tokenizer always has the same bytes.

    Transformers 5 keeps truncation and padding of the latest call inside the tokenizer, stores them with it,
    and turns them into settings when it is opened; it also stores how it was opened. Every call sets the
    former anew, and nothing reads the latter, so nothing is lost.
    """
    state_file, settings_file = folder / _STATE_FILE, folder / _SETTINGS_FILE
    if state_file.is_file():
        state = json.loads(state_file.read_bytes())
        text = json.dumps(state | dict.fromkeys(_STATE), indent=2, ensure_ascii=False)
        state_file.write_text(text + "\n", encoding="utf-8")
    settings = json.loads(settings_file.read_bytes())
    kept = {name: value for name, value in settings.items() if name not in _TRACES}
    # These may be traces or settings; dropped is what says no more than the class does.
    usual = {name: getattr(type(tokenizer), name, None) for name in _SIDES} | {"pad_token_type_id": 0}
    kept = {name: value for name, value in kept.items() if name not in usual or value != usual[name]}
    settings_file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
