"""`errata deploy` and `errata export-onnx`: freeze a pipeline, and write it for another runtime."""

import argparse
import sys
from pathlib import Path
from typing import Any

from errata.cli.output import emit, megabytes
from errata.cli.usage import Commands, add_artifact_argument, add_command, misuse
from errata.errors import ArtifactError

DETAILS = """\
Writes a directory in the layout of diffusers: low-bit codes take the place of the float weights, and a
manifest holds the digest of every file. The output directory must be new or empty.

  errata deploy runs/cifar/compressed --out runs/cifar/artifact
"""
ONNX_DETAILS = """\
Writes an engine: a directory that holds the network as ONNX graphs, one for full calls and one for cached
calls. The step is an input of the graph, so one graph serves every step. The scheduler and the pipeline's
other components are copied from the artifact. Before the directory is written, the graphs are compared with
the artifact's reference backend at three steps. Needs `pip install 'errata[export]'`.

  errata export-onnx runs/cifar/artifact --out runs/cifar/engine
  errata export-onnx runs/cifar/artifact --out runs/cifar/for-openvino --to onnx-qdq
  errata generate runs/cifar/engine --correct iec --at ends:1/10 --out runs/cifar/images

`--to onnx` is for onnxruntime, which runs it in int8. `--to onnx-qdq` is for OpenVINO and TensorRT, which
build int8 kernels from its quantize/dequantize pairs; onnxruntime computes it in floating point.

The batch size is free. Height, width and the lengths of conditions are fixed at export.
"""
FORM_OF = {"onnx": "gathered", "onnx-qdq": "qdq"}
# Its name in releases up to 0.1.
OLDER_NAME = "export"


def add_parser(commands: Commands) -> None:
    """Declare `errata deploy`."""
    parser = add_command(
        commands, "deploy", summary="freeze a compressed pipeline into an artifact", details=DETAILS
    )
    parser.add_argument(
        "compressed", type=Path, metavar="COMPRESSED", help="directory that `errata compress` wrote"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="new directory")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB; a larger denoiser is split (default: 5GB)",
    )
    parser.set_defaults(run=run)


def add_onnx_parser(commands: Commands) -> None:
    """Declare `errata export-onnx`."""
    parser = add_command(
        commands,
        "export-onnx",
        summary="write an artifact as ONNX graphs for another runtime",
        details=ONNX_DETAILS,
        older_names=(OLDER_NAME,),
    )
    add_artifact_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="ENGINE", help="new directory")
    parser.add_argument(
        "--to",
        choices=list(FORM_OF),
        default="onnx",
        help="onnx for onnxruntime, onnx-qdq for OpenVINO and TensorRT (default: onnx)",
    )
    parser.set_defaults(run=export_onnx)


def run(args: argparse.Namespace) -> int:
    """Run `errata deploy`."""
    from errata import compress, deploy
    from errata.deploy.sharding import size_in_bytes

    with misuse(ArtifactError):
        max_shard_size = size_in_bytes(args.max_shard_size)
    path = deploy.deploy(compress.load(args.compressed), args.out, max_shard_size=max_shard_size)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    emit(args, {"artifact": str(path), "bytes": size}, f"artifact: {path}, {megabytes(size)}")
    return 0


def export_onnx(args: argparse.Namespace) -> int:
    """Run `errata export-onnx`."""
    if args.command == OLDER_NAME:
        print("errata: `errata export` is now called `errata export-onnx`", file=sys.stderr)

    from errata.deploy.engines import export_onnx, verify

    path = export_onnx(args.artifact, args.out, form=FORM_OF[args.to])
    manifest = verify(path)
    size = manifest.denoiser_bytes
    payload: dict[str, Any] = {"engine": str(path), "bytes": size, "graphs": sorted(manifest.graphs)}
    emit(args, payload, f"engine: {path}, {megabytes(size)} in {' and '.join(payload['graphs'])}")
    return 0
