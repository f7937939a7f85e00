"""Time the CUDA kernels: every kind of layer of two UNets, and whole networks, against half precision.

    python benchmarks/cuda_kernels.py [--networks ddpm sd15] [--batch-sizes 1 64] [--bits 8 4] [--rounds 20]
    python benchmarks/cuda_kernels.py --device cpu --interpret     # tiny shapes, no GPU: check that it runs

The networks have the architectures of DDPM-CIFAR10 and Stable Diffusion 1.5, with weights of a fixed seed and
scales and zero points that differ from step to step; neither affects speed.

*Layers*: each kind (shape of weight and input) once, with the number of such layers: the Triton kernels
with each tile, `torch._int_mm`, and the layer in compiled, channels_last bfloat16. *Networks*: one full call,
with the fastest kernel for each layer, against the float network in compiled, channels_last bfloat16.
Whatever is between the layers of the low-bit network is in float32, as `deploy.load` leaves it; in bfloat16;
and in compiled bfloat16. Everything is timed inside CUDA graphs. In every round each variant runs
once, in turn, between CUDA events, so that a drift of the clock rate cancels in the ratios. Prints medians,
in milliseconds, and the ratio to half precision.

With `--device cpu` times come from the host's clock and mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from errata.compress import Recipe
from errata.deploy.assembly import finish, install
from errata.deploy.cuda.candidates import candidates
from errata.deploy.cuda.installing import describe
from errata.deploy.cuda.layer import CudaLayer
from errata.deploy.cuda.selection import Fixed
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.timing import CudaTimer
from errata.deploy.kernel_registry import BackendRow
from errata.deploy.reference import ReferenceLayer
from errata.machine import describe_machine
from errata.runtime.layers import Geometry, float_layer
from errata.runtime.scheme import LayerScheme, Scheme, layer_sites, sites_of
from errata.runtime.step_context import StepContext
from errata.runtime.weight_formats import weight_format

STEPS = 4
Measure = Callable[[], float]


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Time the CUDA kernels against half precision.")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=("ddpm", "sd15"),
        default=["ddpm", "sd15"],
        help="architectures (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 64], help="batch sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=(8, 4),
        default=[8, 4],
        help="weight bits (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda", help="device; cpu only with --interpret (default: %(default)s)"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="use Triton's interpreter on tiny shapes, to check that everything runs",
    )
    parser.add_argument("--skip-layers", action="store_true", help="time whole networks only")
    options = parser.parse_args()
    if (options.device == "cpu") != options.interpret:
        parser.error("--device cpu and --interpret go together: no kernel runs on a CPU otherwise")
    return options


@dataclass(frozen=True)
class Network:
    """A float network and what it is called with."""

    unet: nn.Module
    channels: int
    size: int
    context: int | None

    def inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample and conditioning."""
        x = torch.randn(batch_size, self.channels, self.size, self.size, device=device)
        if self.context is None:
            return x, {}
        return x, {"encoder_hidden_states": torch.randn(batch_size, 77, self.context, device=device)}


def network(name: str, *, is_tiny: bool) -> Network:
    """The architecture, or one with the same kinds of layers and few channels."""
    torch.manual_seed(0)
    if name == "ddpm":
        # google/ddpm-cifar10-32: https://huggingface.co/google/ddpm-cifar10-32/blob/main/config.json
        channels = (8, 16, 16, 16) if is_tiny else (128, 256, 256, 256)
        size = 8 if is_tiny else 32
        unet = UNet2DModel(
            sample_size=size,
            in_channels=3,
            out_channels=3,
            layers_per_block=1 if is_tiny else 2,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=4 if is_tiny else 32,
        )
        return Network(unet.eval(), 3, size, None)
    if is_tiny:
        small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        tiny = UNet2DConditionModel(sample_size=8, cross_attention_dim=16, attention_head_dim=2, **small)
        return Network(tiny.eval(), 4, 8, 16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return Network(unet.eval(), 4, 64, 768)


@torch.no_grad()
def main() -> int:
    """Measure and print the tables."""
    options = parse_arguments()
    if options.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported, and others may have imported it already.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    # Else what is compiled too often runs uncompiled, and is taken for the half precision to beat.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; try --device cpu --interpret", file=sys.stderr)
        return 1
    print(f"{describe_machine()}; {', '.join(f'{name} {value}' for name, value in describe(device).items())}")
    rounds = 1 if options.interpret else options.rounds
    for name in options.networks:
        measured = network(name, is_tiny=options.interpret)
        for batch_size in (2,) if options.interpret else options.batch_sizes:
            for bits in options.bits:
                print(f"\n{name}, batch {batch_size}, w{bits}a8")
                if not options.skip_layers:
                    print_layers(measured, batch_size, bits, device, rounds)
                print_networks(measured, batch_size, bits, device, rounds)
    return 0


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same: text of the weight's shape and window, and shape of the input."""

    text: str
    input: tuple[int, ...]


def print_layers(measured: Network, batch_size: int, bits: int, device: torch.device, rounds: int) -> None:
    """One line for each kind of quantized layer."""
    scheme = Scheme.of(measured.unet, Recipe.named(f"w{bits}a8"), branch=0)
    layers = [layer for layer in scheme.layers if layer.activation_bits is not None]
    shapes = input_shapes(measured, layers, batch_size)
    kinds = {layer.name: kind_of(measured.unet, layer, shapes[layer.name]) for layer in layers}
    counts = Counter(kinds.values())
    for layer in layers:
        count = counts.pop(kinds[layer.name], 0)
        if count:
            times = layer_times(measured.unet, layer, shapes[layer.name], device, rounds)
            print_line(f"{count:>3} x {kinds[layer.name].text} on {list(shapes[layer.name])}", times)


def kind_of(unet: nn.Module, layer: LayerScheme, shape: tuple[int, ...]) -> LayerKind:
    """What decides a layer's cost."""
    module = float_layer(unet, layer.name)
    window = f" stride {module.stride[0]}" if isinstance(module, nn.Conv2d) else ""
    text = f"{'x'.join(map(str, module.weight.shape))}{window} w{layer.weight_bits} {layer.input_widths}"
    return LayerKind(text, shape)


def input_shapes(measured: Network, layers: list[LayerScheme], batch_size: int) -> dict[str, tuple[int, ...]]:
    """Of each layer, from a pass without numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    unet = copy.deepcopy(measured.unet).to("meta")
    for layer in layers:

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = layer.name) -> None:
            shapes[name] = tuple(args[0].shape)

        float_layer(unet, layer.name).register_forward_pre_hook(hook)
    x, cond = measured.inputs(batch_size, torch.device("meta"))
    unet(x, torch.zeros(batch_size, device="meta"), **cond)
    return shapes


def layer_times(
    unet: nn.Module, layer: LayerScheme, shape: tuple[int, ...], device: torch.device, rounds: int
) -> dict[str, float]:
    """Milliseconds of every way, half precision first."""
    torch._dynamo.reset()  # all convolutions share a program's place, which holds a few
    module = float_layer(unet, layer.name)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    step_context, tensors = StepContext(), table_of(unet, (layer,))
    step_context.follow(x.device)
    made: dict[str, Callable[..., Any]] = {"half": half_module(module, device)}
    for name in ways(module, layer, shape):
        made[name] = cuda_layer(module, layer, tensors, step_context, name).to(device)
    with step_context.at(1):
        measures = {name: prepared(partial(call, x), device) for name, call in made.items()}
        return interleaved(measures, rounds)


def ways(module: nn.Conv2d | nn.Linear, layer: LayerScheme, shape: tuple[int, ...]) -> list[str]:
    """Names of the int8 ways that can compute the layer."""
    rows = torch.Size(shape).numel() // shape[1 if len(shape) == 4 else -1]
    taps, stride = 1, 1
    if isinstance(module, nn.Conv2d):
        taps, stride = module.kernel_size[0] * module.kernel_size[1], module.stride[0]
    sizes: dict[str, Any] = {"channels": layer.input_widths, "out_channels": module.weight.shape[0]}
    names = candidates(rows=rows // stride**2, taps=taps, dtype=torch.bfloat16, has_triton=True, **sizes)
    return [name for name in names if not name.startswith("half")]


def cuda_layer(
    module: nn.Conv2d | nn.Linear,
    layer: LayerScheme,
    tensors: Mapping[str, Tensor],
    step_context: StepContext,
    name: str,
) -> CudaLayer:
    """The layer, always computed in one way."""
    tables = [
        DeviceStepTable(tensors[f"{site.name}.scale"], tensors[f"{site.name}.zero_point"], step_context)
        for site in layer_sites(layer)
    ]
    codes = random_codes(layer, module)
    scale, bias = tensors[f"{layer.name}.weight_scale"], tensors.get(f"{layer.name}.bias")
    return CudaLayer(layer, Geometry(module), codes, scale, bias, tables, Fixed(name))


def half_module(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """In bfloat16, channels_last and compiled."""
    made: Any = copy.deepcopy(module).to(device, torch.bfloat16)
    made = made.to(memory_format=torch.channels_last)
    return compiled(made, device)


def compiled(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """By the compiler that counts; on the CPU, where time does not, only traced."""
    if device.type == "cpu":
        return torch.compile(module, backend="aot_eager")
    return torch.compile(module, mode="max-autotune-no-cudagraphs")


def print_networks(measured: Network, batch_size: int, bits: int, device: torch.device, rounds: int) -> None:
    """One line for a full call, and how often each kernel was chosen."""
    torch._dynamo.reset()
    step_context = StepContext()
    calls: dict[str, Callable[[], object]] = {}
    reports: dict[str, list[BackendRow]] = {}
    calls["half"] = called(half_module(measured.unet, device), measured, batch_size, torch.bfloat16, device)
    with step_context.at(1):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"low bit {str(dtype).removeprefix('torch.')}"
            unet, reports[name] = low_bit_network(measured.unet, bits, dtype, step_context, device)
            calls[name] = called(unet, measured, batch_size, dtype, device)
            calls[name]()  # kernels are chosen here, before anything is traced or recorded
        whole = compiled(unet, device)
        calls[f"{name} compiled"] = called(whole, measured, batch_size, dtype, device)
        measures = {key: prepared(call, device) for key, call in calls.items()}
        print_line("full call", interleaved(measures, rounds))
    for name, rows in reports.items():
        print(f"    {name}: {dict(Counter(row.backend for row in rows))}")


def called(
    unet: Callable[..., Any], measured: Network, batch_size: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A full call, its inputs being those of every other."""
    torch.manual_seed(0)
    x, cond = measured.inputs(batch_size, device)
    x = x.to(dtype, memory_format=torch.channels_last)
    timestep = torch.full((batch_size,), 500.0, device=device)
    cond = {name: value.to(dtype) for name, value in cond.items()}
    return lambda: unet(x, timestep, **cond, return_dict=False)


def low_bit_network(
    unet: nn.Module, bits: int, dtype: torch.dtype, step_context: StepContext, device: torch.device
) -> tuple[nn.Module, list[BackendRow]]:
    """The network on the runtime's layers, `dtype` between them, and its report."""
    made = copy.deepcopy(unet)
    scheme = Scheme.of(unet, Recipe.named(f"w{bits}a8"), branch=0)
    tensors = table_of(unet, scheme.layers) | codes_of(unet, scheme.layers) | attention_table(scheme)
    backend = "auto" if device.type == "cuda" else "triton"
    rows = install(made, scheme, tensors, context=step_context, backend=backend, device=device)
    finish(made, rows, step_context)
    for parameter in made.parameters():  # of norms; scales and biases of quantized layers stay as they are
        parameter.data = parameter.data.to(dtype)
    for part in made.modules():
        if isinstance(part, ReferenceLayer):  # those with float inputs
            part.to(dtype)
    return made.eval().requires_grad_(False).to(device), rows


def table_of(unet: nn.Module, layers: tuple[LayerScheme, ...]) -> dict[str, Tensor]:
    """Scales, zero points and biases of layers; scales differ from step to step."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        module = float_layer(unet, layer.name)
        limit = 2 ** (layer.weight_bits - 1) - 1
        largest = module.weight.detach().flatten(1).abs().amax(dim=1) / limit
        tensors[f"{layer.name}.weight_scale"] = largest.expand(len(layer.input_widths), -1).contiguous()
        if module.bias is not None:
            tensors[f"{layer.name}.bias"] = module.bias.detach().clone()
        for site in layer_sites(layer):
            tensors |= steps_of(site.name)
    return tensors


def attention_table(scheme: Scheme) -> dict[str, Tensor]:
    """Scales and zero points of the inputs of attentions."""
    tensors: dict[str, Tensor] = {}
    for site in sites_of(Scheme(attentions=scheme.attentions)):
        tensors |= steps_of(site.name)
    return tensors


def steps_of(name: str) -> dict[str, Tensor]:
    """A range from about -4 to 4, wider from step to step."""
    return {
        f"{name}.scale": 0.03 * torch.arange(1, STEPS + 1).float(),
        f"{name}.zero_point": torch.full((STEPS,), 128, dtype=torch.uint8),
    }


def codes_of(unet: nn.Module, layers: tuple[LayerScheme, ...]) -> dict[str, Tensor]:
    """Codes as an artifact stores them."""
    return {
        f"{layer.name}.codes": weight_format(layer.weight_bits).pack(
            random_codes(layer, float_layer(unet, layer.name))
        )
        for layer in layers
    }


def random_codes(layer: LayerScheme, module: nn.Conv2d | nn.Linear) -> Tensor:
    """Any codes: their values cost nothing."""
    limit = 2 ** (layer.weight_bits - 1) - 1
    return torch.randint(-limit, limit + 1, module.weight.shape, dtype=torch.int8)


def prepared(call: Callable[[], object], device: torch.device) -> Measure:
    """Seconds per call: of a graph of several on a device, by the host's clock elsewhere."""
    return CudaTimer().prepare(call) if device.type == "cuda" else on_host(call)


def on_host(call: Callable[[], object]) -> Measure:
    """Seconds by the host's clock."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def interleaved(measures: Mapping[str, Measure], rounds: int) -> dict[str, float]:
    """Median milliseconds; `prepare` has run every call before."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            times[name].append(measure())
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def print_line(text: str, times: Mapping[str, float]) -> None:
    """Milliseconds of each way and its gain over half precision."""
    shown = [f"{name} {value:.3f} ({times['half'] / value:.2f}x)" for name, value in times.items()]
    print(f"{text:<60} {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
