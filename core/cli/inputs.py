"""What a pipeline takes and needs, and how the options of `errata generate` become its arguments."""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from errata.cli.usage import UsageError
from errata.errors import ErrataError, first_line

# Option, keyword argument of the pipeline, and whether each image has its own.
_OPTIONS = (
    ("prompt", "prompt", True),
    ("negative_prompt", "negative_prompt", True),
    ("label", "class_labels", True),
    ("image", "image", True),
    ("guidance_scale", "guidance_scale", False),
)
_WORDS = {
    "prompt": "a prompt",
    "negative_prompt": "a negative prompt",
    "class_labels": "a class label",
    "image": "an input image",
    "guidance_scale": "a guidance scale",
}


def call_arguments(pipe: Any, args: argparse.Namespace) -> Callable[[int], dict[str, Any]]:
    """Return a function that maps a batch size to the pipeline's keyword arguments, without generators.

    Raises:
        UsageError: the pipeline does not take an argument, or needs one that is missing.
    """
    each: dict[str, Any] = {}
    common: dict[str, Any] = {} if args.steps is None else {"num_inference_steps": args.steps}
    for option, argument, is_for_each in _OPTIONS:
        value = getattr(args, option)
        check_argument(pipe, argument, flag=f"--{option.replace('_', '-')}", is_given=value is not None)
        if value is not None:
            (each if is_for_each else common)[argument] = _open(value) if option == "image" else value
    if args.label is not None:
        check_labels(pipe, [args.label])
    if takes_batch_size(pipe):
        return lambda count: (
            {name: [value] * count for name, value in each.items()} | common | {"batch_size": count}
        )
    return lambda count: {name: [value] * count for name, value in each.items()} | common


def check_argument(pipe: Any, argument: str, *, flag: str, is_given: bool) -> None:
    """Check that an option was given if the pipeline needs it, and only if the pipeline takes it.

    Raises:
        UsageError: naming the pipeline and the option.
    """
    name = type(pipe).__name__
    if is_given and not _takes(pipe, argument):
        raise UsageError(f"{name} does not take {_WORDS[argument]}; leave {flag} out")
    if not is_given and argument in needs(pipe):
        raise UsageError(f"{name} needs {_WORDS[argument]} for every image; add {flag}")


def check_labels(pipe: Any, labels: Sequence[int]) -> None:
    """Check that class labels are in range; a pipeline without `num_labels` accepts any.

    Raises:
        UsageError: naming the first label that is not.
    """
    count = getattr(pipe, "num_labels", None)
    for label in labels:
        if count is not None and not 0 <= label < count:
            raise UsageError(f"class label {label} is out of range; allowed are 0 to {count - 1}")


def needs(pipe: Any) -> tuple[str, ...]:
    """Return the arguments without which the pipeline cannot be called."""
    needed = [name for name in ("prompt", "image") if name in _parameters(pipe)]
    return (*needed, *(["class_labels"] if getattr(pipe, "num_labels", 0) else []))


@contextmanager
def rejections_as_errors(pipe: Any) -> Iterator[None]:
    """Turn the pipeline's complaint about its arguments into an error of one line.

    Raises:
        ErrataError: the pipeline rejected its arguments.
    """
    try:
        yield
    except ErrataError:
        raise
    except (TypeError, ValueError) as problem:
        reason = first_line(problem)
        raise ErrataError(f"{type(pipe).__name__} rejected its arguments: {reason}") from problem


def takes_batch_size(pipe: Any) -> bool:
    """Return whether the pipeline's call has a `batch_size`."""
    return "batch_size" in _parameters(pipe)


def _parameters(pipe: Any) -> Sequence[str]:
    return tuple(inspect.signature(type(pipe).__call__).parameters)


def _takes(pipe: Any, argument: str) -> bool:
    if argument == "class_labels" and getattr(pipe, "num_labels", None) == 0:
        return False
    return argument in _parameters(pipe)


def _open(path: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as problem:
        raise UsageError(
            f"`{path}` cannot be opened as an image ({problem}); give a PNG or JPEG file"
        ) from problem
