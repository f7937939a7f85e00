"""`errata verify` and `errata inspect`: whether an artifact, sheet or plan is intact, and what is in it."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.output import cache_row, cache_text, emit, exceptions_text, megabytes, table
from errata.cli.plan_files import check_attaches, is_plan_file, plan_words
from errata.cli.sharing import check_signature_options
from errata.cli.startup import lean_imports
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

Of a plan or a sheet it checks that it is whole. With --for, it also loads the artifact, and checks that the
plan or sheet can be used on it:

  errata verify runs/cifar/plan.json --for runs/cifar/artifact
"""
DETAILS = """\
Verifies an artifact, then shows its size, sampler, cache schedule (one character for each denoiser call: F is
full, c is cached), origin, and layers with their bits and bytes. It loads no model, unless --backends asks
which kernel runs each layer, and why.

  errata inspect runs/cifar/artifact --backends
"""
# Under the values of the facts.
INDENT = " " * 13


def add_verify_parser(commands: Commands) -> None:
    """Declare `errata verify`."""
    parser = add_command(
        commands, "verify", summary="check that an artifact, sheet or plan is intact", details=VERIFY_DETAILS
    )
    add_artifact_argument(parser, or_file=True)
    parser.add_argument(
        "--for",
        type=Path,
        metavar="DIR",
        dest="user",
        help="the artifact that will use this sheet or plan: check that it can",
    )
    parser.add_argument("--signature", type=Path, metavar="FILE", help="signature that `errata sign` wrote")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="the signer's public key, a PEM file")
    parser.set_defaults(run=verify)


def add_parser(commands: Commands) -> None:
    """Declare `errata inspect`."""
    parser = add_command(
        commands, "inspect", summary="show what is in an artifact, sheet or plan", details=DETAILS
    )
    add_artifact_argument(parser, or_file=True)
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
        found = _checked_plan if is_plan_file(args.artifact) else _checked_sheet
        return _verified(args, *found(args))
    if args.user is not None:
        raise UsageError("--for is for sheets and plans, which an artifact uses; leave it out")

    from errata import deploy

    # Most artifacts are checked without diffusers; others need it.
    with lean_imports(args, args.artifact, runs_kernels=False):
        manifest = deploy.verify(args.artifact, signature=args.signature, public_key=args.public_key)
    return _verified(args, {"manifest": manifest.to_json()}, manifest.summary())


def _checked_sheet(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    with lean_imports(args, args.user, runs_kernels=args.user is not None):
        from errata.correct import Plan
        from errata.correct.sheets.sheet_sharing import verify_sheet

    sheet = verify_sheet(args.artifact, signature=args.signature, public_key=args.public_key)
    if args.user is not None:
        check_attaches(Plan.of_sheet(sheet), args.user)
    return {"sheet": sheet.summary()}, sheet.summary_text()


def _checked_plan(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.signature is not None:
        raise UsageError("--signature is for artifacts and sheets, and this is a plan; leave it out")

    with lean_imports(args, args.user, runs_kernels=args.user is not None):
        from errata.correct import Plan

    plan = Plan.load(args.artifact)
    if args.user is not None:
        check_attaches(plan, args.user)
    return {"plan": plan.to_json()}, plan_words(plan)


def _verified(args: argparse.Namespace, found: Mapping[str, Any], summary: str) -> int:
    """Print what was verified."""
    signed = args.signature is not None
    text = f"{summary}\nverified: {args.artifact}"
    text += f"\nsigned by the owner of {args.public_key}" if signed else ""
    text += f"\nfits: {args.user}" if args.user is not None else ""
    emit(args, {"verified": True, "signed": signed, **found}, text)
    return 0


def _inspect_file(args: argparse.Namespace) -> int:
    if args.backends:
        raise UsageError("--backends is for artifacts; sheets and plans run on any backend: leave it out")

    with lean_imports(args, None, runs_kernels=False):
        from errata.correct import Plan, Sheet

    if is_plan_file(args.artifact):
        plan = Plan.load(args.artifact)
        emit(args, {"plan": plan.to_json()}, plan_words(plan))
        return 0
    sheet = Sheet.load(args.artifact)
    emit(args, {"sheet": sheet.summary()}, sheet.summary_text())
    return 0


def run(args: argparse.Namespace) -> int:
    """Run `errata inspect`."""
    for option in ("device", "backend"):
        if getattr(args, option) is not None and not args.backends:
            raise UsageError(f"--{option} has no effect without --backends; add it, or leave --{option} out")
    if args.artifact.is_file():
        return _inspect_file(args)

    from errata import deploy
    from errata.deploy.loading import is_engine
    from errata.deploy.verification import layer_rows

    if is_engine(args.artifact):
        return _inspect_engine(args)
    with lean_imports(args, args.artifact, runs_kernels=args.backends):
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
    with lean_imports(args, args.artifact):
        from errata.deploy.assembly import load_artifact

    deployed = load_artifact(args.artifact, device=args.device, backend=args.backend or "auto")
    return {
        row.layer.partition(" ")[0]: {"backend": row.backend, "reason": row.reason}
        for row in deployed.backend_report()
    }


def _facts(artifact: Path, manifest: "Manifest") -> str:
    from errata.runtime.paired_change import output_map_text

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
    return cache_text(schedule, indent=INDENT)


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
