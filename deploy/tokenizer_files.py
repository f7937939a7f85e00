"""A tokenizer's files without traces of its use, so that the same tokenizer always has the same bytes.

Transformers 5 keeps truncation and padding of the latest call inside the tokenizer, stores them with it, and
turns them into settings when it is opened; it also stores how it was opened. Every call sets the former anew,
and nothing reads the latter, so nothing is lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def forget_use(folder: Path, tokenizer: Any) -> None:
    """Rewrites the files of `tokenizer` in `folder`."""
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
