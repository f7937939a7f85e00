"""Options of `errata report` beside artifacts and plans, and the command that they spell."""

import argparse
from pathlib import Path

from errata.cli.plans import choices
from errata.cli.usage import several


def add_metric_options(group: argparse._ArgumentGroup) -> None:
    """Declare what is measured."""
    group.add_argument(
        "--features",
        default="digit-features",
        metavar="NETWORK",
        help="inception (the FID's), inception:WEIGHTS, a folder of a transformers vision model, "
        "package.module:attribute of your own, or digit-features, of the built-in model (default)",
    )
    group.add_argument("--clip", metavar="MODEL", help="a CLIP model, for a CLIP score of image and prompt")
    group.add_argument(
        "--lpips", choices=("alex", "vgg", "squeeze"), help="a learned distance of single images, too"
    )
    group.add_argument(
        "--amplification",
        metavar="STEPS",
        help="sampling steps to probe for how much they amplify errors, as in 0,12,24; slow (default: none)",
    )
    group.add_argument(
        "--resamples", type=several, default=200, metavar="N", help="of each interval (default: 200)"
    )
    group.add_argument(
        "--save-stats", type=Path, metavar="FILE", help="write the statistics of --reference, and stop"
    )


def add_scale_options(group: argparse._ArgumentGroup) -> None:
    """Declare shards and merging."""
    group.add_argument("--shard", metavar="I/N", help="measure share I of N, from 0, and make no report yet")
    group.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="make the report of what was measured in these directories; no ARTIFACT is needed",
    )


def command_of(args: argparse.Namespace) -> list[str]:
    """The command that gives the same report again."""
    words = ["errata", "report", *map(str, args.artifacts)]
    for name in (
        *("reference", "features", "baseline", "samples", "batch_size", "seed", "device", "backend"),
        *(
            "prompts",
            "labels",
            "negative_prompt",
            "guidance_scale",
            "clip",
            "lpips",
            "amplification",
            "resamples",
        ),
        *("plan", "correct", "at", *(choice.field for choice in choices()), "out"),
    ):
        value = getattr(args, name)
        if name == "correct":
            value = ["+".join(given) for given in value or ()]
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", str(each)]
    return words if args.equal_compute else [*words, "--no-equal-compute"]
