"""What images are made from beside noise: prompts and class labels, one an image, and guidance."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from errata.cli.columns import read_labels, read_prompts
from errata.cli.inputs import check_argument, check_labels, needs, takes_batch_size
from errata.cli.usage import UsageError, finite

# Option: argument of the pipeline.
CONDITIONS = {
    "--prompts": "prompt",
    "--labels": "class_labels",
    "--negative-prompt": "negative_prompt",
    "--guidance-scale": "guidance_scale",
}
SOURCES_TOLD = """\
A SOURCE is a text file with one entry a line, FILE:COLUMN of a parquet, CSV or JSON file, or DATASET:COLUMN
on the hub; its first rows are taken, in order, from the split "train"."""


def add_condition_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--prompts", metavar="SOURCE", help="one prompt an image, see below")
    parser.add_argument("--labels", metavar="SOURCE", help="one class label an image, see below")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from, for every image"
    )
    parser.add_argument(
        "--guidance-scale", type=finite, metavar="X", help="of guided pipelines (default: the pipeline's)"
    )


def read_conditions(args: argparse.Namespace, count: int) -> "tuple[list[str] | None, list[int] | None]":
    """Prompts and labels of `count` images, of those that the options name.

    Raises:
        UsageError: there are fewer, or what is there is of another kind.
    """
    prompts = None if args.prompts is None else read_prompts(args.prompts, limit=count)
    labels = None if args.labels is None else read_labels(args.labels, limit=count)
    for what, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and len(values) < count:
            raise UsageError(
                f"`{getattr(args, what)}` has {len(values)} {what}, --samples {count} need one each; give "
                f"more {what}, or lower --samples"
            )
    return prompts, labels


def check_conditions(pipe: Any, args: argparse.Namespace, labels: list[int] | None, *, way_out: str) -> None:
    """Refuse, before any work, options that the pipeline has no use for, and name what is missing.

    Raises:
        UsageError: naming the option; a pipeline that needs pictures has its `way_out` told.
    """
    if "image" in needs(pipe):
        raise UsageError(
            f"this {type(pipe).__name__} needs a picture for every image, which this command cannot give; "
            f"{way_out}"
        )
    for flag, argument in CONDITIONS.items():
        is_given = getattr(args, flag.removeprefix("--").replace("-", "_")) is not None
        check_argument(pipe, argument, flag=flag, is_given=is_given)
    check_labels(pipe, labels or ())


def inputs_of(
    pipe: Any, args: argparse.Namespace, prompts: list[str] | None, labels: list[int] | None
) -> Callable[[range], Mapping[str, Any]]:
    """The pipeline's keyword arguments for images of given indices."""
    counts = takes_batch_size(pipe)

    def inputs(indices: range) -> Mapping[str, Any]:
        given: dict[str, Any] = {"batch_size": len(indices)} if counts else {}
        for name, values in (("prompt", prompts), ("class_labels", labels)):
            if values is not None:
                given[name] = [values[index] for index in indices]
        if args.negative_prompt is not None:
            given["negative_prompt"] = [args.negative_prompt] * len(indices)
        if args.guidance_scale is not None:
            given["guidance_scale"] = args.guidance_scale
        return given

    return inputs
