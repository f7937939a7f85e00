"""`errata inspect`: what an artifact is made of."""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.output import cache_row, emit, megabytes, table
from errata.cli.usage import Commands, UsageError, add_backend_option, add_command, add_device_option

if TYPE_CHECKING:
    from errata.compress import CacheSchedule
    from errata.deploy import Manifest
    from errata.deploy.engines.manifest import TensorSpec
    from errata.deploy.verification import LayerRow

DETAILS = """\
Verifies an artifact and shows its size, the sampler that its scales belong to, the cache schedule, one
character a denoiser call (F: full, c: served from the cache), where it came from, and its layers with
their bits and bytes. Loads nothing, unless --backends asks which kernel would run each layer, and why.

  errata inspect runs/cifar/artifact --backends
"""
# Denoiser calls in one row of the schedule's picture, and how far apart the numbers above them are.
ROW, MARK = 100, 10
INDENT = " " * 13


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "inspect", summary="show what an artifact is made of", details=DETAILS)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument(
        "--backends", action="store_true", help="load it, and say which kernel runs each layer"
    )
    add_device_option(parser)
    add_backend_option(parser)
    parser.set_defaults(run=run, backend=None)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for option in ("device", "backend"):
        if getattr(args, option) is not None and not args.backends:
            raise UsageError(f"--{option} has no effect without --backends")

    from errata import deploy
    from errata.deploy.loading import is_engine
    from errata.deploy.verification import layer_rows

    if is_engine(args.artifact):
        return _inspect_engine(args)
    manifest = deploy.verify(args.artifact)
    rows = layer_rows(args.artifact, manifest)
    kernels = _kernels(args) if args.backends else None
    parts = [_facts(args.artifact, manifest)]
    if rows:
        parts += [_weights_table(rows), _layer_table(rows, kernels)]
    else:
        parts.append("nothing quantized: every layer runs in the weights' own precision")
    payload = {
        "manifest": manifest.to_json(),
        "manifest_sha256": manifest.sha256,
        "cache": cache_row(manifest.schedule),
        "layers": [asdict(row) | (kernels[row.layer] if kernels else {}) for row in rows],
    }
    emit(args, payload, "\n\n".join(parts))
    return 0


def _inspect_engine(args: argparse.Namespace) -> int:
    """Its layers are inside the graphs, so what is shown in their place is what the graphs take and give."""
    if args.backends:
        raise UsageError("--backends is for artifacts; every layer of an engine runs in the engine's runtime")

    from errata.deploy.engines import verify

    manifest = verify(args.artifact)
    lines = [
        [name, megabytes(manifest.files[name].bytes), _ends(graph.inputs), _ends(graph.outputs)]
        for name, graph in sorted(manifest.graphs.items())
    ]
    payload = {
        "manifest": manifest.to_json(),
        "manifest_sha256": manifest.sha256,
        "cache": cache_row(manifest.schedule),
    }
    facts = f"{_facts(args.artifact, manifest)}\n{'engine of':<12} {manifest.artifact.sha256}"
    emit(args, payload, f"{facts}\n\n{table(('graph', 'size', 'inputs', 'outputs'), lines)}")
    return 0


def _ends(specs: "Sequence[TensorSpec]") -> str:
    """Names and sizes; B is the number of samples."""
    return " ".join(
        f"{spec.name}[{','.join('B' if size is None else str(size) for size in spec.shape)}]"
        for spec in specs
    )


def _kernels(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Backend and reason of each layer, by its name without the report's remark on the part that is meant."""
    from errata import deploy

    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend or "auto")
    return {
        row.layer.partition(" ")[0]: {"backend": row.backend, "reason": row.reason}
        for row in deployed.backend_report()
    }


def _facts(artifact: Path, manifest: "Manifest") -> str:
    times = manifest.sampler.timesteps
    share = manifest.denoiser_bytes / manifest.float32_weight_bytes
    facts = {
        "artifact": artifact,
        "digest": manifest.sha256,
        "recipe": manifest.recipe.name + ("" if manifest.is_quantized else " (nothing quantized)"),
        "exceptions": _exceptions(manifest),
        "pipeline": f"{manifest.pipeline_class} with {manifest.unet_class}",
        "size": f"{megabytes(manifest.artifact_bytes)} in {len(manifest.files)} files and the manifest; the "
        f"denoiser is {share:.3f} of its float32 weights, {megabytes(manifest.float32_weight_bytes)}",
        "components": _components(manifest),
        "sampler": f"{manifest.sampler.scheduler_class}, {manifest.sampler.num_inference_steps} steps, "
        f"{len(times)} denoiser calls at timesteps {times[0]:g} to {times[-1]:g}",
        "cache": _cache(manifest.schedule),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()),
        "calibration": f"\n{INDENT}".join(f"{name} {value}" for name, value in manifest.calibration.items()),
    }
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def _cache(schedule: "CacheSchedule") -> str:
    """How many calls are full, and a picture of all of them."""
    if not schedule.has_cache:
        return f"none: all {schedule.num_steps} calls are full"
    resnets = "the last resnet" if schedule.branch == 1 else f"the last {schedule.branch} resnets"
    told = (
        f"{len(schedule.full_steps)} of {schedule.num_steps} calls are full, F; a cached one, c, recomputes "
        f"{resnets} of the up path"
    )
    if schedule.calls_per_step > 1:
        told += f"; {schedule.calls_per_step} calls make a step"
    return "\n".join([told, *(INDENT + line for line in _picture(cache_row(schedule)))])


def _picture(row: str) -> list[str]:
    """The row in lines of `ROW` characters, each below the numbers of its calls."""
    lines = []
    for start in range(0, len(row), ROW):
        part = row[start : start + ROW]
        marks = "".join(f"{start + at:<{MARK}}" for at in range(0, len(part), MARK))
        lines += [marks.rstrip(), part]
    return lines


def _components(manifest: "Manifest") -> str:
    """What the pipeline is made of, with the bytes of its files."""
    sizes: Counter[str] = Counter()
    for path, record in manifest.files.items():
        component, slash, _ = path.partition("/")
        if slash:
            sizes[component] += record.bytes
    return ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())


def _exceptions(manifest: "Manifest") -> str:
    quantization = manifest.recipe.quantization
    return (quantization.exceptions() if quantization is not None else "") or "none"


def _weights_table(rows: Sequence["LayerRow"]) -> str:
    """How many layers and weights there are of each width, and what they take with scales and biases."""
    groups: dict[int, list[LayerRow]] = {}
    for row in rows:
        if row.weight_bits is not None:
            groups.setdefault(row.weight_bits, []).append(row)
    lines = []
    for bits, members in sorted(groups.items()):
        count, size = sum(math.prod(row.shape) for row in members), sum(row.bytes for row in members)
        lines.append([bits, len(members), f"{count:,}", f"{size:,}", f"{8 * size / count:.2f}"])
    return table(("weight bits", "layers", "weights", "bytes", "bits a weight, all told"), lines)


def _layer_table(rows: Sequence["LayerRow"], kernels: dict[str, dict[str, str]] | None) -> str:
    total = sum(row.bytes for row in rows)
    header = ["layer", "kind", "shape", "weights", "inputs", "bytes", "share"]
    body = [[*_cells(row), f"{row.bytes / total:.1%}"] for row in rows]
    if kernels is not None:
        header += ["backend", "reason"]
        body = [[*cells, *kernels[row.layer].values()] for cells, row in zip(body, rows, strict=True)]
    elif any(row.is_corrected for row in rows):
        header.append("remark")
        body = [
            [*cells, "output corrected in cached calls" if row.is_corrected else ""]
            for cells, row in zip(body, rows, strict=True)
        ]
    return table(header, body)


def _cells(row: "LayerRow") -> list[str]:
    shape = "x".join(map(str, row.shape))
    weights = "" if row.weight_bits is None else f"int{row.weight_bits}"
    inputs = "float" if row.input_bits is None else f"int{row.input_bits}"
    return [row.layer, row.kind, shape, weights, inputs, f"{row.bytes:,}"]
