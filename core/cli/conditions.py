"""Prompts, class labels, input images and guidance: options, and where their values are read from."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from errata.cli.input_images import (
    IMAGES_TOLD,
    InputImages,
    Parser,
    add_image_options,
    check_size,
    read_images,
)
from errata.cli.inputs import check_argument, check_labels, takes_batch_size
from errata.cli.usage import UsageError, finite, read_text
from errata.errors import first_line

# Option: keyword argument of the pipeline.
CONDITIONS = {
    "--prompts": "prompt",
    "--labels": "class_labels",
    "--negative-prompt": "negative_prompt",
    "--guidance-scale": "guidance_scale",
    "--input-images": "image",
    "--masks": "mask_image",
}
SOURCES_TOLD = f"""\
A SOURCE of prompts or labels is a text file with one entry per line, FILE:COLUMN of a parquet, CSV or JSON
file, or DATASET:COLUMN on the hub (split "train"). The first rows are used, in order.

{IMAGES_TOLD}"""
# The names under which `datasets` knows its readers of local files.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_ALLOWED = "a text file, FILE:COLUMN of a .parquet, .csv, .json or .jsonl file, or DATASET:COLUMN on the hub"


def add_condition_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--prompts", metavar="SOURCE", help="one prompt per image, see below")
    add_input_options(parser)
    parser.add_argument(
        "--guidance-scale", type=finite, metavar="X", help="guidance scale (default: the pipeline's)"
    )


def add_input_options(parser: Parser) -> None:
    """Declare the options of `inputs_of_batches`."""
    parser.add_argument("--labels", metavar="SOURCE", help="one class label per image, see below")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what the images should not show; the same for all"
    )
    add_image_options(parser)


@dataclass(frozen=True)
class Conditions:
    """What each image of a command is made from besides noise; None where its option was not given."""

    prompts: list[str] | None
    labels: list[int] | None
    images: InputImages | None


def read_conditions(args: argparse.Namespace, count: int, *, told: str | None = None) -> Conditions:
    """Return the prompts, labels and input images of `count` images.

    `told` says in an error what needs so many; None is `--samples`.

    Raises:
        UsageError: a source has too few entries, or entries of the wrong kind.
    """
    source = getattr(args, "prompts", None)
    prompts = None if source is None else read_prompts(source, limit=count)
    labels = None if args.labels is None else read_labels(args.labels, limit=count)
    images = read_images(args, count)
    for what, given, values in (
        ("prompts", source, prompts),
        ("labels", args.labels, labels),
        ("input images", args.input_images, None if images is None else images.images),
    ):
        if values is not None:
            check_count(given, what, len(values), count, told=told or f"--samples {count}")
    return Conditions(prompts, labels, images)


def check_count(source: object, what: str, found: int, count: int, *, told: str) -> None:
    """Check that a source has an entry for each image; `told` are the options, or else, that need so many.

    Raises:
        UsageError: it has fewer.
    """
    if found < count:
        way_out = f", or lower {told.split()[0]}" if told.startswith("--") else ""
        raise UsageError(
            f"`{source}` has {found} {what}, and {told} needs one for each of {count} images; "
            f"add {what}{way_out}"
        )


def check_conditions(
    pipe: Any, args: argparse.Namespace, given: Conditions, *, is_complete: bool = True
) -> None:
    """Check, before any work, that the options are those that the pipeline takes and needs.

    `is_complete` is whether all that it needs has to be among them.

    Raises:
        UsageError: an option does not fit or is missing.
    """
    for flag, argument in CONDITIONS.items():
        is_given = getattr(args, flag.removeprefix("--").replace("-", "_"), None) is not None
        if is_given or is_complete:
            check_argument(pipe, argument, flag=flag, is_given=is_given)
    check_labels(pipe, given.labels or ())
    if given.images is not None:
        check_size(pipe, given.images)


def inputs_of(
    pipe: Any, args: argparse.Namespace, conditions: Conditions
) -> Callable[[range], Mapping[str, Any]]:
    """Return a function that maps image numbers to the pipeline's keyword arguments.

    Beyond the last prompt, label or input image it begins with the first one again: `--correct auto` looks
    at a number of images of its own.
    """
    counts = takes_batch_size(pipe)

    def inputs(indices: range) -> Mapping[str, Any]:
        given: dict[str, Any] = {"batch_size": len(indices)} if counts else {}
        given |= arguments_of_each(args, conditions, indices)
        if args.guidance_scale is not None:
            given["guidance_scale"] = args.guidance_scale
        return given

    return inputs


def arguments_of_each(args: argparse.Namespace, conditions: Conditions, indices: range) -> dict[str, Any]:
    """Return the arguments that have a value for each image, by name: lists of those of some images."""
    given: dict[str, Any] = {}
    for name, values in (("prompt", conditions.prompts), ("class_labels", conditions.labels)):
        if values is not None:
            given[name] = [values[index % len(values)] for index in indices]
    if args.negative_prompt is not None:
        given["negative_prompt"] = [args.negative_prompt] * len(indices)
    if conditions.images is not None:
        given |= conditions.images.arguments(indices)
    return given


def inputs_of_batches(
    args: argparse.Namespace, conditions: Conditions, *, samples: int, batch_size: int
) -> Iterator[dict[str, Any]] | None:
    """Return the arguments of each sample-batch besides prompts, for `calibrate`; None if there are none."""
    others = replace(conditions, prompts=None)
    if not arguments_of_each(args, others, range(1)):
        return None
    starts = range(0, samples, batch_size)
    batches = (range(start, min(start + batch_size, samples)) for start in starts)
    return (arguments_of_each(args, others, batch) for batch in batches)


def read_prompts(source: str, *, limit: int) -> list[str]:
    """Return the first `limit` prompts of a text file, one per line, or of a column of a file or dataset.

    Raises:
        UsageError: the source cannot be read or is empty, or an entry is not text.
    """
    prompts: list[str] = []
    for value in _read(source, limit):
        if not isinstance(value, str):
            raise UsageError(f"`{source}` holds {value!r}, which is not text; choose another column")
        prompts.append(value)
    return prompts


def read_labels(source: str, *, limit: int) -> list[int]:
    """Return the first `limit` class labels, whole numbers, of the same kinds of source.

    Raises:
        UsageError: the source cannot be read or is empty, or an entry is not a whole number.
    """
    labels: list[int] = []
    for value in _read(source, limit):
        is_number = type(value) is int or (isinstance(value, str) and value.isdecimal())
        if not is_number:
            raise UsageError(f"`{source}` holds {value!r}, which is not a class label; choose another column")
        labels.append(int(value))
    return labels


def _read(source: str, limit: int) -> list[Any]:
    path = Path(source)
    if path.is_file() and path.suffix not in _READERS:
        lines = read_text(path).splitlines()
        values: list[Any] = [line.strip() for line in lines if line.strip()][:limit]
    else:
        values = _column(source, limit)
    if not values:
        raise UsageError(f"`{source}` is empty; it needs at least one entry")
    return values


def _column(source: str, limit: int) -> list[Any]:
    name, _, column = source.rpartition(":")
    if not name or not column:
        hint = " (the column is missing)" if Path(source).is_file() else ""
        raise UsageError(f"`{source}` cannot be read{hint}; allowed are {_ALLOWED}")

    import datasets

    reader = _READERS.get(Path(name).suffix)
    try:
        if reader is not None:
            if not Path(name).is_file():
                raise FileNotFoundError(f"no such file: {name}")
            rows = datasets.load_dataset(reader, data_files=name, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(name, split="train", streaming=True)
        first = list(islice(rows, limit))
    except Exception as problem:  # datasets, its readers and the hub raise whatever they like
        reason = first_line(problem)
        raise UsageError(f"`{source}` cannot be read: {reason}; allowed are {_ALLOWED}") from problem
    if first and column not in first[0]:
        raise UsageError(f"`{name}` has no column `{column}`; it has {', '.join(sorted(first[0]))}")
    return [row[column] for row in first]
