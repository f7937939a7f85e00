"""What a pipeline takes and needs, and what the options of `errata generate` mean to it."""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from errata.cli.usage import UsageError
from errata.errors import ErrataError, first_line

# Option, argument of the pipeline, and whether every image has its own.
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
    "image": "a picture",
    "guidance_scale": "a guidance scale",
}


def call_arguments(pipe: Any, args: argparse.Namespace) -> Callable[[int], dict[str, Any]]:
    """What a batch of a given size is called with, beside its generators.

    Raises:
        UsageError: the pipeline takes no such argument, or needs one that is missing.
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
    """Refuse an option that the pipeline has no use for, and ask for one that it cannot do without.

    Raises:
        UsageError: naming the pipeline and the option.
    """
    name = type(pipe).__name__
    if is_given and not _takes(pipe, argument):
        raise UsageError(f"this {name} takes no {_WORDS[argument].partition(' ')[2]}; leave {flag} out")
    if not is_given and argument in needs(pipe):
        raise UsageError(f"this {name} needs {_WORDS[argument]} for every image; give {flag}")


def check_labels(pipe: Any, labels: Sequence[int]) -> None:
    """Refuse class labels that the pipeline does not know; one that counts no labels may know any.

    Raises:
        UsageError: naming the first one.
    """
    count = getattr(pipe, "num_labels", None)
    for label in labels:
        if count is not None and not 0 <= label < count:
            raise UsageError(f"class label {label} is out of range; allowed are 0 to {count - 1}")


def needs(pipe: Any) -> tuple[str, ...]:
    """Arguments that the pipeline draws nothing without."""
    needed = [name for name in ("prompt", "image") if name in _parameters(pipe)]
    return (*needed, *(["class_labels"] if getattr(pipe, "num_labels", 0) else []))


def check_unconditional(pipe: Any, *, what: str) -> None:
    """Refuse a model that draws nothing from noise alone, before any image.

    Raises:
        UsageError: naming what it needs, and `what` has none to give.
    """
    if needed := needs(pipe):
        raise UsageError(
            f"this {type(pipe).__name__} needs {words(needed)} for every image, and {what} has none to "
            "give so far; make the images with `errata generate`, plain and corrected, and compare them"
        )


def words(arguments: Sequence[str]) -> str:
    """The arguments for people, as in `a prompt and a picture`."""
    return " and ".join(_WORDS[argument] for argument in arguments)


@contextmanager
def refusals_told(pipe: Any) -> Iterator[None]:
    """Let what the pipeline says of its arguments be the error, in one line.

    Raises:
        ErrataError: the pipeline refused them.
    """
    try:
        yield
    except ErrataError:
        raise
    except (TypeError, ValueError) as problem:
        reason = first_line(problem)
        raise ErrataError(f"{type(pipe).__name__} refused its arguments: {reason}") from problem


def takes_batch_size(pipe: Any) -> bool:
    """Whether a call says how many images it wants."""
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
            f"`{path}` cannot be opened as a picture ({problem}); give a PNG or JPEG"
        ) from problem
