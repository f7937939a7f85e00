"""What a pipeline takes and needs, and how the options of `errata generate` become its arguments."""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from errata.cli.usage import UsageError
from errata.errors import ErrataError, first_line

# Option and keyword argument of the pipeline. Values are the same for every image, except those of folders.
_OF_EACH = (
    ("prompt", "prompt"),
    ("negative_prompt", "negative_prompt"),
    ("label", "class_labels"),
    ("image", "image"),
)
_OF_ALL = (("guidance_scale", "guidance_scale"),)
_FOLDERS = (("input_images", "image"), ("masks", "mask_image"))
_WORDS = {
    "prompt": "a prompt",
    "negative_prompt": "a negative prompt",
    "class_labels": "a class label",
    "image": "an input image",
    "mask_image": "a mask",
    "guidance_scale": "a guidance scale",
}


def call_arguments(pipe: Any, args: argparse.Namespace) -> Callable[[int], dict[str, Any]]:
    """Return a function that maps a batch size to the pipeline's keyword arguments, without generators.

    Raises:
        UsageError: the pipeline does not take an argument, or needs one that is missing.
    """
    _check_options(pipe, args)
    values = {argument: getattr(args, option) for option, argument in (*_OF_EACH, *_OF_ALL)}
    values = {argument: value for argument, value in values.items() if value is not None}
    if args.image is not None:
        values["image"] = _open(args.image)
    each = {argument: values.pop(argument) for _, argument in _OF_EACH if argument in values}
    common = values if args.steps is None else {"num_inference_steps": args.steps, **values}
    if args.label is not None:
        check_labels(pipe, [args.label])
    if takes_batch_size(pipe):
        return lambda count: (
            {name: [value] * count for name, value in each.items()} | common | {"batch_size": count}
        )
    return lambda count: {name: [value] * count for name, value in each.items()} | common


def _check_options(pipe: Any, args: argparse.Namespace) -> None:
    """Check each option with `check_argument`; one of two that give the same argument is enough."""
    options = (*_OF_EACH, *_OF_ALL, *_FOLDERS)
    giving = {argument: option for option, argument in options if getattr(args, option) is not None}
    for option, argument in options:
        if giving.get(argument, option) == option:
            flag = f"--{option.replace('_', '-')}"
            check_argument(pipe, argument, flag=flag, is_given=argument in giving)


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
    needed = [name for name in ("prompt", "image", "mask_image") if name in parameters(pipe)]
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
    return "batch_size" in parameters(pipe)


def parameters(pipe: Any) -> Sequence[str]:
    """Return the names of the arguments of the pipeline's call."""
    return tuple(inspect.signature(type(pipe).__call__).parameters)


def _takes(pipe: Any, argument: str) -> bool:
    if argument == "class_labels" and getattr(pipe, "num_labels", None) == 0:
        return False
    return argument in parameters(pipe)


def _open(path: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as problem:
        raise UsageError(
            f"`{path}` cannot be opened as an image ({problem}); give a PNG or JPEG file"
        ) from problem
