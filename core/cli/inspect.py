"""`errata inspect`: what an artifact is made of."""

import argparse
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.output import cache_row, emit, megabytes, schedule_text, table
from errata.cli.usage import Commands, add_backend_option, add_command, add_device_option

if TYPE_CHECKING:
    from errata.deploy import DeployedPipeline, Manifest

DETAILS = """\
Layers with their scheme, size and kernel; the cache schedule (F: full step, c: served from the cache);
the sampler that the scales belong to; what made it.
"""
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "inspect", summary="show what an artifact is made of", details=DETAILS)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    add_device_option(parser)
    add_backend_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import deploy

    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend)
    layers = _layers(args.artifact, deployed)
    cache = cache_row(deployed.manifest.schedule)
    payload = {"manifest": deployed.manifest.to_json(), "cache": cache, "layers": layers}
    emit(args, payload, f"{_facts(args.artifact, deployed.manifest)}\n\n{_layer_table(layers)}")
    return 0


def _facts(artifact: Path, manifest: "Manifest") -> str:
    times = manifest.sampler.timesteps
    share = manifest.denoiser_bytes / manifest.float32_weight_bytes
    facts = {
        "artifact": artifact,
        "digest": manifest.sha256,
        "recipe": manifest.recipe.name + ("" if manifest.is_quantized else " (nothing quantized)"),
        "exceptions": _exceptions(manifest),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()),
        "pipeline": f"{manifest.pipeline_class} with {manifest.unet_class}",
        "sampler": f"{manifest.sampler.scheduler_class}, {manifest.sampler.num_inference_steps} steps, "
        f"timesteps {times[0]:g} to {times[-1]:g}",
        "calibration": ", ".join(f"{name} {value}" for name, value in manifest.calibration.items()),
        "cache": schedule_text(manifest.schedule) if manifest.schedule.has_cache else "none",
        "components": _components(manifest),
        "size": f"{megabytes(manifest.artifact_bytes)}; the denoiser is {share:.3f} of its float32 weights",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


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


def _layers(artifact: Path, deployed: "DeployedPipeline") -> list[dict[str, Any]]:
    """The backend report, with the bytes that each row takes on disk."""
    rows = [asdict(row) for row in deployed.backend_report()]
    sizes = _sizes(artifact, [_module(row) for row in rows])
    return [{**row, "bytes": sizes[_module(row)]} for row in rows]


def _module(row: dict[str, Any]) -> str:
    """The module's name, without the report's remark on which part of it is meant."""
    return str(row["layer"]).partition(" ")[0]


def _sizes(artifact: Path, modules: list[str]) -> Counter[str]:
    """Bytes of the tensors of each module, those of modules inside it left out."""
    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    innermost_first = sorted(modules, key=len, reverse=True)
    for path in sorted((artifact / "unet").glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                owner = next((module for module in innermost_first if name.startswith(f"{module}.")), "")
                view = file.get_slice(name)
                sizes[owner] += BYTES[view.get_dtype()] * math.prod(view.get_shape())
    return sizes


def _layer_table(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return "nothing quantized: every layer runs in the weights' own precision"
    columns = ("layer", "kind", "scheme", "bytes", "backend", "reason")
    return table(columns, [[row[column] for column in columns] for row in layers])
