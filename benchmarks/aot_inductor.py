"""Compare AOTInductor with an artifact's own runtime: time, size and distance. The artifact has no cache.

    OMP_NUM_THREADS=1 python benchmarks/aot_inductor.py --artifact DIR --batch-size 8

The network is exported with oneDNN's int8 operators, whose scales are gathered by a step that is an input,
and compiled with its weights folded into oneDNN's layout; attention is left in floating point. The result
works for one batch size and the CPU it was built on. It is a compiled library: do not run one from a
directory that you did not make yourself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from call_timing import interleaved_seconds
from torch import Tensor, nn

from errata import deploy
from errata.deploy import reference
from errata.deploy.assembly import load_artifact as load
from errata.deploy.assembly import restore_buffers
from errata.deploy.engines.agreement import distance
from errata.deploy.engines.example import example_inputs
from errata.deploy.engines.onnx_graphs import FullGraph
from errata.deploy.engines.onnx_layers import StepTables, weight_parts
from errata.deploy.full_check import empty_unet
from errata.deploy.sharding import read_tensors
from errata.deploy.tensor_check import float_parameters
from errata.deploy.tensors import read_codes
from errata.machine import describe_machine
from errata.runtime.layers import Geometry, float_layer, replace_module
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

STEP = 3


def main() -> None:
    """Compile, compare and time."""
    parser = argparse.ArgumentParser(description="AOTInductor against errata's own CPU runtime.")
    parser.add_argument("--artifact", type=Path, required=True, help="artifact without a cache")
    parser.add_argument("--batch-size", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    own = deploy.load(options.artifact).denoiser
    exact = load(options.artifact, device="cpu", backend="reference")
    sample, _ = example_inputs(exact, {"batch_size": options.batch_size})
    x, step = sample.to(memory_format=torch.channels_last), torch.tensor(STEP)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "full.pt2"
        start = time.perf_counter()
        compiled = compiled_network(options.artifact, x, step, file)
        print(f"compiled in {time.perf_counter() - start:.0f} s, {file.stat().st_size:,} bytes")
        expected, _ = exact.denoiser.full(x, STEP, {})
        calls: dict[str, Callable[[], Tensor]] = {
            "the artifact": lambda: own.full(x, STEP, {})[0],
            "AOTInductor": lambda: compiled(x, step)[0],
        }
        for name, seconds in interleaved_seconds(calls, options.rounds).items():
            away = distance(calls[name](), expected)
            print(f"{name:<14} {1000 * statistics.median(seconds):>8.1f} ms, {away:.3f} from the reference")


def compiled_network(root: Path, x: Tensor, step: Tensor, file: Path) -> Any:
    """The artifact's network as a program of `x` and the step, written to `file` and loaded."""
    manifest = deploy.verify(root)
    tensors = read_tensors(root, manifest)
    unet, context = empty_unet(root, manifest), StepContext()
    parameters = {name: tensors[name] for name in float_parameters(unet, manifest.scheme)}
    for layer in manifest.scheme.layers:
        module = float_layer(unet, layer.name)
        codes = read_codes(layer, tensors, module.weight.shape)
        made: nn.Module
        if layer.activation_bits is None:
            bias = tensors.get(f"{layer.name}.bias")
            scale = tensors[f"{layer.name}.weight_scale"]
            made = reference.ReferenceLayer(layer, Geometry(module), codes, scale, bias, [nn.Identity()])
        else:
            made = InductorLayer(layer, Geometry(module), codes, tensors, context)
        replace_module(unet, layer.name, made)
    unet.load_state_dict(parameters, strict=False, assign=True)
    restore_buffers(unet)
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    graph = FullGraph(BranchedUNet(unet), context, manifest, names=()).eval()
    program = torch.export.export(graph, (x, step), strict=False)
    with torch._inductor.config.patch(freezing=True):
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return torch._inductor.aoti_load_package(str(file))


class InductorLayer(nn.Module):
    """A layer on oneDNN's operators that take the scale as a tensor; attention's products stay in float."""

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        tensors: Mapping[str, Tensor],
        context: StepContext,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.bias: Tensor | None
        self.register_buffer("bias", tensors.get(f"{scheme.name}.bias"))
        self.parts = nn.ModuleList(
            _Part(geometry, *part) for part in weight_parts(scheme, codes, tensors, context)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the float layer."""
        inputs = self.geometry.split(x, self.scheme.input_widths)
        outputs = [
            part(given, None if index else self.bias)
            for index, (part, given) in enumerate(zip(self.parts, inputs, strict=True))
        ]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(dim=0)


class _Part(nn.Module):
    def __init__(self, geometry: Geometry, codes: Tensor, scale: Tensor, tables: StepTables) -> None:
        super().__init__()
        self.geometry, self.tables = geometry, tables
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scale, zero_point = self.tables.now()
        codes = torch.clamp(torch.round(x / scale + zero_point), 0, 255).to(torch.uint8)
        at = (scale, zero_point.to(torch.int32))
        weight, ending = (self.scale, self.zero, bias), (1.0, 0, torch.float32, "none", [], "")
        product: Tensor
        if not self.geometry.is_conv:
            packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
            product = torch.ops.onednn.qlinear_pointwise.tensor(codes, *at, packed, *weight, *ending)
            return product
        shape = [list(getattr(self.geometry, name)) for name in ("stride", "padding", "dilation")]
        packed = torch.ops.onednn.qconv_prepack(self.codes, self.scale, 1.0, 0, *shape, 1, None)
        product = torch.ops.onednn.qconv_pointwise.tensor(codes, *at, packed, *weight, *shape, 1, *ending)
        return product


# torch 2.13 has no shapes for what packs weights.
@torch.library.register_fake("onednn::qconv_prepack")
def _conv_packed(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.register_fake("onednn::qlinear_prepack")
def _linear_packed(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape[::-1])


if __name__ == "__main__":
    main()
