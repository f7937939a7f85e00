"""Time one guided evaluation of a UNet of Stable Diffusion 1.5's size: floats, the artifact, OpenVINO.

    python benchmarks/real_size.py --work runs/real_size            # makes pipeline and artifact, once
    OMP_NUM_THREADS=1 python benchmarks/real_size_call.py --work runs/real_size
    OMP_NUM_THREADS=2 python benchmarks/real_size_call.py --work runs/real_size --threads 2 --variants errata
    python benchmarks/real_size_call.py --work runs/real_size --variants openvino-int8-bfloat16

Batch 2, 64x64 latents (or `--latents 96`), 77 tokens of 768 channels, random weights: only times matter
here. For OpenVINO (packages openvino and nncf) the same network is converted, and quantized by NNCF for
transformers from one sample, without bias correction; its models are kept in `--work`. Variants take turns in
one process, and each figure is the median over the rounds, of CPU time and of wall time. The ratio of two
variants in one process varied from run to run: compare processes of one variant each, in turn, as well.
`errata-cached` is a cached call at branch 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from call_timing import Call, interleaved_seconds
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from errata import deploy
from errata.machine import describe_machine
from errata.memory import keep_freed_memory
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.schedule import CacheSchedule

TEXT = (2, 77, 768)
# Names of OpenVINO's variants: which model, and the precision of what is not int8.
OPENVINO = {
    "openvino-bfloat16": ("float", "bf16"),
    "openvino-int8": ("int8", "f32"),
    "openvino-int8-bfloat16": ("int8", "bf16"),
}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN, CACHED = "errata", "errata-cached"


@torch.no_grad()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder that real_size.py wrote")
    parser.add_argument("--threads", type=int, default=1, help="threads of all variants")
    parser.add_argument("--latents", type=int, default=64, help="their height and width")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[OWN, CACHED, *TORCH, *OPENVINO],
        default=[OWN, *TORCH],
        help="what to time",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for all variants alike, as the `errata` command does
    variants = {name: variant(name, options) for name in options.variants}
    print(f"{describe_machine()}; {options.threads} threads, {options.rounds} rounds")
    cpu, wall = (
        interleaved_seconds(variants, options.rounds, warm_up=2, clock=clock)
        for clock in (time.process_time, time.perf_counter)
    )
    for name in variants:
        print(
            f"{name:24} {statistics.median(cpu[name]):7.2f} s of CPU, "
            f"{statistics.median(wall[name]):7.2f} s of wall time"
        )


def variant(name: str, options: argparse.Namespace) -> Call:
    """Return a call of a variant."""
    x, text = torch.randn(2, 4, options.latents, options.latents), torch.randn(TEXT)
    if name in (OWN, CACHED):
        deployed = deploy.load(options.work / "artifact")
        cond = {"encoder_hidden_states": text}
        if name == OWN:
            return lambda: deployed.denoiser.full(x, 0, cond)
        denoiser = with_cache(deployed.denoiser)
        feature = denoiser.full(x, 0, cond)[1]
        return lambda: denoiser.cached(x, 0, cond, feature)
    if name in OPENVINO:
        return openvino_variant(name, options, x, text)
    unet = float_network(options).to(TORCH[name])
    return lambda: unet(x.to(TORCH[name]), 1, text.to(TORCH[name]))


def with_cache(denoiser: Any) -> UNetDenoiser:
    """Return the same network with a cache at branch 1."""
    steps = denoiser.schedule.num_steps
    schedule = CacheSchedule(num_steps=steps, full_steps=(0,), branch=1)
    cached: UNetDenoiser = denoiser.at(schedule, denoiser.timesteps, tuple(range(steps)))
    return cached


def float_network(options: argparse.Namespace) -> nn.Module:
    """Return the network in float32."""
    unet: nn.Module = UNet2DConditionModel.from_pretrained(options.work / "pipeline" / "unet")
    return unet.eval()


def openvino_variant(name: str, options: argparse.Namespace, x: Tensor, text: Tensor) -> Call:
    """Return a call of a model in OpenVINO, converted unless it is there."""
    import openvino

    size = "" if options.latents == 64 else f"-{options.latents}"  # a model serves one size
    files = {form: options.work / f"openvino-{form}{size}.xml" for form in ("float", "int8")}
    if not all(file.exists() for file in files.values()):
        convert(options, x, text, files)
    form, precision = OPENVINO[name]
    settings = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(
        files[form], "CPU", {**settings, "INFERENCE_PRECISION_HINT": precision}
    )
    inputs = {0: x.numpy(), 1: torch.tensor(1).numpy(), 2: text.numpy()}
    return lambda: model(inputs)


def convert(options: argparse.Namespace, x: Tensor, text: Tensor, files: Mapping[str, Path]) -> None:
    """Write OpenVINO's form of the network, as it is and quantized by NNCF."""
    import nncf
    import openvino

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = float_network(options)

        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            prediction: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
            return prediction

    given = (x, torch.tensor(1), text)
    model = openvino.convert_model(Plain(), example_input=given, input=[tuple(part.shape) for part in given])
    openvino.save_model(model, files["float"], compress_to_fp16=False)
    gc.collect()
    names = [part.get_any_name() for part in model.inputs]
    data = nncf.Dataset([{name: part.numpy() for name, part in zip(names, given, strict=True)}])
    quantized = nncf.quantize(
        model,
        data,
        subset_size=1,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    openvino.save_model(quantized, files["int8"], compress_to_fp16=False)


if __name__ == "__main__":
    main()
