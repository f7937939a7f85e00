"""Options of `errata report` beside artifacts and plans, and the command that they spell.

The plain ones are the fields of `errata.report_options.ReportOptions`: a new field is an option here.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from errata.cli.plans import choices
from errata.cli.usage import positive, seed, several, whole
from errata.report_options import ReportOptions

# Readers of whole numbers, by the least that is allowed.
_READERS: dict[int, Callable[[str], int]] = {0: whole, 1: positive, 2: several}
# Options that decide what a report measures, in the order in which its command shows them.
_FIRST = ("reference", "features", "baseline")
_LAST = (
    "device",
    "backend",
    "prompts",
    "labels",
    "negative_prompt",
    "guidance_scale",
    "clip",
    "lpips",
    "metric",
)


def add_plain_options(group: argparse._ArgumentGroup) -> None:
    """Declare an option for each field of `ReportOptions`."""
    for item in fields(ReportOptions):
        about, default = item.metadata["about"], item.default
        flag = f"--{item.name.replace('_', '-')}"
        if isinstance(default, bool):
            flags = [flag.replace("--", "--no-", 1), item.metadata["old_flag"]]
            group.add_argument(*filter(None, flags), dest=item.name, action="store_false", help=about)
            continue
        group.add_argument(
            flag,
            type=_reader(item),
            default=default,
            metavar=item.metadata["metavar"],
            help=f"{about} (default: {'none' if default is None else default})",
        )


def add_metric_options(group: argparse._ArgumentGroup) -> None:
    """Declare what is measured."""
    group.add_argument(
        "--features",
        default="digit-features",
        metavar="NETWORK",
        help="feature network: inception (that of the FID), inception:WEIGHTS, a directory of a "
        "transformers vision model, package.module:attribute of your own, or digit-features, of the built-in "
        "model (default)",
    )
    group.add_argument("--clip", metavar="MODEL", help="a CLIP model, for the CLIP score of image and prompt")
    group.add_argument(
        "--lpips", choices=("alex", "vgg", "squeeze"), help="measure LPIPS, with this backbone"
    )
    group.add_argument(
        "--metric",
        action="append",
        metavar="METRIC",
        help="a metric of your own, package.module:attribute; may be repeated",
    )
    group.add_argument(
        "--save-stats", type=Path, metavar="FILE", help="write the statistics of --reference to FILE and stop"
    )


def add_scale_options(group: argparse._ArgumentGroup) -> None:
    """Declare shards and merging."""
    group.add_argument(
        "--shard", metavar="I/N", help="measure shard I of N, counted from 0, without making the report"
    )
    group.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="make the report of the measurements in these directories; takes no ARTIFACT",
    )


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the fields of `ReportOptions`."""
    return {item.name: getattr(args, item.name) for item in fields(ReportOptions)}


def command_of(args: argparse.Namespace) -> list[str]:
    """Return the command that makes the same report again."""
    words = ["errata", "report", *map(str, args.artifacts)]
    plain = [item for item in fields(ReportOptions) if not isinstance(item.default, bool)]
    changed = [item.name for item in plain if _is_spelled(item, getattr(args, item.name))]
    placed = ("plan", "correct", "at", *(choice.field for choice in choices()))
    for name in (*_FIRST, *changed, *_LAST, *placed, "out"):
        words += _spelled(name, getattr(args, name))
    return [*words, *_switched_off(args)]


def _is_spelled(item: "Field[Any]", value: object) -> bool:
    """Return whether the command names a plain option: it decides the images, or was changed."""
    return item.name in ("samples", "batch_size", "seed", "resamples") or value != item.default


def _spelled(name: str, value: Any) -> Iterator[str]:
    if name == "correct":
        value = ["+".join(given) for given in value or ()]
    for each in value if isinstance(value, list) else [value]:
        if each is not None:
            yield f"--{name.replace('_', '-')}"
            yield str(each)


def _switched_off(args: argparse.Namespace) -> list[str]:
    switches = [item.name for item in fields(ReportOptions) if isinstance(item.default, bool)]
    return [f"--no-{name.replace('_', '-')}" for name in switches if not getattr(args, name)]


def _reader(item: "Field[Any]") -> Callable[[str], Any]:
    if item.name == "seed":
        return seed
    least = item.metadata["least"]
    return str if least is None else _READERS[least]
