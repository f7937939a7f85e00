"""`errata export`: an artifact's network as files for another runtime."""

import argparse
from pathlib import Path
from typing import Any

from errata.cli.output import emit, megabytes
from errata.cli.usage import Commands, add_command

FORM_OF = {"onnx": "gathered", "onnx-qdq": "qdq"}
DETAILS = """\
Writes an engine directory: the network as ONNX graphs that onnxruntime runs in int8, one for full calls and
one for cached calls, which takes the feature as an input; the step is an input too, so each serves every
step. Everything beside the network is the artifact's own. Before the directory is there, the graphs are
compared with the artifact's reference backend at three steps. Needs `pip install 'errata[export]'`.

  errata export runs/cifar/artifact --out runs/cifar/engine
  errata export runs/cifar/artifact --out runs/cifar/for-openvino --to onnx-qdq
  errata generate runs/cifar/engine --correct iec --at ends:1/10 --out runs/cifar/images

`onnx-qdq` is for OpenVINO and TensorRT, whose scales are constants: they build int8 kernels from its
quantize/dequantize pairs, and onnxruntime computes it in floating point.

Sizes are those of the call that the graphs are taken from; the number of samples is free.
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "export", summary="write an artifact's network for another runtime", details=DETAILS
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="ENGINE", help="new directory")
    parser.add_argument("--to", choices=list(FORM_OF), default="onnx", help="kind of engine (default: onnx)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata.deploy.engines import export_onnx, verify

    path = export_onnx(args.artifact, args.out, form=FORM_OF[args.to])
    manifest = verify(path)
    size = manifest.denoiser_bytes
    payload: dict[str, Any] = {"engine": str(path), "bytes": size, "graphs": sorted(manifest.graphs)}
    emit(args, payload, f"{megabytes(size)} in {' and '.join(payload['graphs'])}; the engine is in {path}")
    return 0
