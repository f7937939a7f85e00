"""What the options of `errata generate` mean to a pipeline."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from errata.cli.usage import UsageError

# Option, argument of the pipeline, and whether every image has its own.
_OPTIONS = (
    ("prompt", "prompt", True),
    ("negative_prompt", "negative_prompt", True),
    ("label", "class_labels", True),
    ("image", "image", True),
    ("guidance_scale", "guidance_scale", False),
)


def call_arguments(pipe: Any, args: argparse.Namespace) -> Callable[[int], dict[str, Any]]:
    """What a batch of a given size is called with, beside its generators.

    Raises:
        UsageError: the pipeline takes no such argument, or needs one that is missing.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    each: dict[str, Any] = {}
    common: dict[str, Any] = {} if args.steps is None else {"num_inference_steps": args.steps}
    for option, argument, is_for_each in _OPTIONS:
        value = getattr(args, option)
        flag = f"--{option.replace('_', '-')}"
        if value is None:
            continue
        if argument not in parameters:
            raise UsageError(f"this model takes no {option.replace('_', ' ')}; leave {flag} out")
        (each if is_for_each else common)[argument] = _open(value) if option == "image" else value
    for option, argument in (("prompt", "prompt"), ("image", "image")):
        if argument in parameters and argument not in each:
            raise UsageError(f"this model takes {_article(option)}; give --{option}")
    if "batch_size" in parameters:
        return lambda count: (
            {name: [value] * count for name, value in each.items()} | common | {"batch_size": count}
        )
    return lambda count: {name: [value] * count for name, value in each.items()} | common


def _open(path: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as problem:
        raise UsageError(
            f"`{path}` cannot be opened as a picture ({problem}); give a PNG or JPEG"
        ) from problem


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
