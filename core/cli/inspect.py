"""`errata verify` and `errata inspect`: whether an artifact is intact, and what is in it."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.output import cache_row, emit, exceptions_text, megabytes, table
from errata.cli.sharing import check_signature_options
from errata.cli.usage import (
    Commands,
    UsageError,
    add_artifact_argument,
    add_backend_option,
    add_command,
    add_device_option,
)

if TYPE_CHECKING:
    from errata.compress import CacheSchedule
    from errata.deploy import Manifest
    from errata.deploy.engines.manifest import TensorSpec
    from errata.deploy.verification import LayerRow

VERIFY_DETAILS = """\
Checks the digest of every file, that every tensor matches its declared scheme, and that the float weights of
quantized layers are gone. It loads no model. A digest shows damage; a signature also shows who made it:

  errata verify runs/cifar/artifact --signature runs/cifar/artifact.sig --public-key key.pub
"""
DETAILS = """\
Verifies an artifact, then shows its size, sampler, cache schedule (one character for each denoiser call: F is
full, c is cached), origin, and layers with their bits and bytes. It loads no model, unless --backends asks
which kernel runs each layer, and why.

  errata inspect runs/cifar/artifact --backends
"""
# Denoiser calls in one line of the schedule, and the distance between the numbers above them.
ROW, MARK = 100, 10
INDENT = " " * 13


def add_verify_parser(commands: Commands) -> None:
    """Declare `errata verify`."""
    parser = add_command(
        commands, "verify", summary="check that an artifact or a sheet is intact", details=VERIFY_DETAILS
    )
    add_artifact_argument(parser, or_sheet=True)
    parser.add_argument("--signature", type=Path, metavar="FILE", help="signature that `errata sign` wrote")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="the signer's public key, a PEM file")
    parser.set_defaults(run=verify)


def add_parser(commands: Commands) -> None:
    """Declare `errata inspect`."""
    parser = add_command(
        commands, "inspect", summary="show what is in an artifact or a sheet", details=DETAILS
    )
    add_artifact_argument(parser, or_sheet=True)
    parser.add_argument(
        "--backends", action="store_true", help="load the artifact, and show which kernel runs each layer"
    )
    add_device_option(parser)
    add_backend_option(parser)
    parser.set_defaults(run=run, backend=None)


def verify(args: argparse.Namespace) -> int:
    """Run `errata verify`."""
    check_signature_options(args)
    if args.artifact.is_file():
        return _verify_sheet(args)

    from errata import deploy

    manifest = deploy.verify(args.artifact, signature=args.signature, public_key=args.public_key)
    return _verified(args, {"manifest": manifest.to_json()}, manifest.summary())


def _verify_sheet(args: argparse.Namespace) -> int:
    from errata.correct.sheets.sheet_sharing import verify_sheet

    sheet = verify_sheet(args.artifact, signature=args.signature, public_key=args.public_key)
    return _verified(args, {"sheet": sheet.summary()}, sheet.summary_text())


def _verified(args: argparse.Namespace, found: Mapping[str, Any], summary: str) -> int:
    """Print what was verified."""
    signed = args.signature is not None
    text = f"{summary}\nverified: {args.artifact}"
    text += f"\nsigned by the owner of {args.public_key}" if signed else ""
    emit(args, {"verified": True, "signed": signed, **found}, text)
    return 0


def _inspect_sheet(args: argparse.Namespace) -> int:
    if args.backends:
        raise UsageError("--backends is for artifacts; a sheet runs on any backend: leave it out")

    from errata.correct import Sheet

    sheet = Sheet.load(args.artifact)
    emit(args, {"sheet": sheet.summary()}, sheet.summary_text())
    return 0


def run(args: argparse.Namespace) -> int:
    """Run `errata inspect`."""
    for option in ("device", "backend"):
        if getattr(args, option) is not None and not args.backends:
            raise UsageError(f"--{option} has no effect without --backends; add it, or leave --{option} out")
    if args.artifact.is_file():
        return _inspect_sheet(args)

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
        parts.append("nothing is quantized: every layer runs in the precision of its weights")
    payload = {
        "manifest": manifest.to_json(),
        "manifest_sha256": manifest.sha256,
        "cache": cache_row(manifest.schedule),
        "layers": [asdict(row) | (kernels[row.layer] if kernels else {}) for row in rows],
    }
    emit(args, payload, "\n\n".join(parts))
    return 0


def _inspect_engine(args: argparse.Namespace) -> int:
    """Show an engine, with the inputs and outputs of its graphs in place of layers."""
    if args.backends:
        raise UsageError("--backends is for artifacts: an engine runs in onnxruntime alone; leave it out")

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
    """Return names and sizes; B is the batch size."""
    return " ".join(
        f"{spec.name}[{','.join('B' if size is None else str(size) for size in spec.shape)}]"
        for spec in specs
    )


def _kernels(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return backend and reason by layer name, without the remark that the report adds to some names."""
    from errata import deploy

    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend or "auto")
    return {
        row.layer.partition(" ")[0]: {"backend": row.backend, "reason": row.reason}
        for row in deployed.backend_report()
    }


def _facts(artifact: Path, manifest: "Manifest") -> str:
    from errata.runtime.output_map import output_map_text

    times = manifest.sampler.timesteps
    share = manifest.denoiser_bytes / manifest.float32_weight_bytes
    facts = {
        "artifact": artifact,
        "digest": manifest.sha256,
        "recipe": manifest.recipe.name + ("" if manifest.is_quantized else " (nothing quantized)"),
        "exceptions": exceptions_text(manifest.recipe),
        "pipeline": f"{manifest.pipeline_class} with {manifest.unet_class}",
        "size": f"{megabytes(manifest.artifact_bytes)} in {len(manifest.files)} files and the manifest; the "
        f"denoiser is {share:.3f} of its float32 weights, {megabytes(manifest.float32_weight_bytes)}",
        "components": _components(manifest),
        "sampler": f"{manifest.sampler.scheduler_class}, {manifest.sampler.num_inference_steps} steps, "
        f"{len(times)} denoiser calls at timesteps {times[0]:g} to {times[-1]:g}",
        "cache": _cache(manifest.schedule),
        "output": output_map_text(manifest.scheme, manifest.calibrated_output),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()),
        "calibration": f"\n{INDENT}".join(f"{name} {value}" for name, value in manifest.calibration.items()),
    }
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def _cache(schedule: "CacheSchedule") -> str:
    """Return how many calls are full, and the schedule, one character for each call."""
    if not schedule.has_cache:
        return f"none: all {schedule.num_steps} calls are full"
    resnets = "the last resnet" if schedule.branch == 1 else f"the last {schedule.branch} resnets"
    summary = (
        f"{len(schedule.full_steps)} of {schedule.num_steps} calls are full (F); a cached call (c) "
        f"recomputes {resnets} of the up path"
    )
    if schedule.calls_per_step > 1:
        summary += f"; each sampling step makes {schedule.calls_per_step} calls"
    return "\n".join([summary, *(INDENT + line for line in _picture(cache_row(schedule)))])


def _picture(row: str) -> list[str]:
    """Return lines of `ROW` characters, each below the numbers of its calls."""
    lines = []
    for start in range(0, len(row), ROW):
        part = row[start : start + ROW]
        marks = "".join(f"{start + at:<{MARK}}" for at in range(0, len(part), MARK))
        lines += [marks.rstrip(), part]
    return lines


def _components(manifest: "Manifest") -> str:
    """Return the pipeline's components with the bytes of their files."""
    sizes: Counter[str] = Counter()
    for path, record in manifest.files.items():
        component, slash, _ = path.partition("/")
        if slash:
            sizes[component] += record.bytes
    return ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())


def _weights_table(rows: Sequence["LayerRow"]) -> str:
    """Return a table of layers, weights and bytes by bit width; bytes include scales and biases."""
    groups: dict[int, list[LayerRow]] = {}
    for row in rows:
        if row.weight_bits is not None:
            groups.setdefault(row.weight_bits, []).append(row)
    lines = []
    for bits, members in sorted(groups.items()):
        count, size = sum(math.prod(row.shape) for row in members), sum(row.bytes for row in members)
        lines.append([bits, len(members), f"{count:,}", f"{size:,}", f"{8 * size / count:.2f}"])
    return table(("weight bits", "layers", "weights", "bytes", "bits per weight, in total"), lines)


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
