"""Time one guided evaluation of a UNet of Stable Diffusion 1.5's size: floats, the artifact, OpenVINO.

    python benchmarks/real_size.py --work runs/real_size            # makes pipeline and artifact, once
    OMP_NUM_THREADS=1 python benchmarks/real_size_call.py --work runs/real_size
    OMP_NUM_THREADS=2 python benchmarks/real_size_call.py --work runs/real_size --threads 2 --openvino

Batch 2, 64x64 latents, 77 tokens of 768 channels, random weights: only times matter here. With `--openvino`
(packages openvino and nncf) the same network is converted, and quantized by NNCF for transformers from one
sample, without bias correction; its models are kept in `--work`. Variants take turns in one process, and each
figure is the median over the rounds, of CPU time and of wall time.
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

LATENTS, TEXT = (2, 4, 64, 64), (2, 77, 768)


@torch.no_grad()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder that real_size.py wrote")
    parser.add_argument("--threads", type=int, default=1, help="threads of all variants")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--openvino", action="store_true", help="also time OpenVINO")
    parser.add_argument("--no-floats", action="store_true", help="leave torch's float networks out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for all variants alike, as the `errata` command does
    x, text = torch.randn(LATENTS), torch.randn(TEXT)
    deployed = deploy.load(options.work / "artifact")
    variants: dict[str, Call] = {
        "errata w8a8": lambda: deployed.denoiser.full(x, 0, {"encoder_hidden_states": text})
    }
    if options.openvino:
        variants |= openvino_variants(options, x, text)
    if not options.no_floats:
        variants |= float_variants(options, x, text)
    print(f"{describe_machine()}; {options.threads} threads, {options.rounds} rounds")
    times = {
        clock.__name__: interleaved_seconds(variants, options.rounds, warm_up=1, clock=clock)
        for clock in (time.process_time, time.perf_counter)
    }
    report(variants, *times.values())


def report(names: Mapping[str, Any], cpu: Mapping[str, list[float]], wall: Mapping[str, list[float]]) -> None:
    """Print medians, and the ratio of the artifact's CPU time to each."""
    own = statistics.median(cpu["errata w8a8"])
    for name in names:
        seconds = statistics.median(cpu[name])
        print(
            f"{name:32} {seconds:7.2f} s of CPU, {statistics.median(wall[name]):7.2f} s of wall time; "
            f"errata takes {own / seconds:.2f} of it"
        )


def float_network(options: argparse.Namespace) -> nn.Module:
    """Return the network in float32."""
    unet: nn.Module = UNet2DConditionModel.from_pretrained(options.work / "pipeline" / "unet")
    return unet.eval()


def float_variants(options: argparse.Namespace, x: Tensor, text: Tensor) -> dict[str, Call]:
    """Torch's eager network, in float32 and in bfloat16."""
    plain = float_network(options)
    half = float_network(options).to(torch.bfloat16)
    return {
        "torch float32": lambda: plain(x, 1, text),
        "torch bfloat16": lambda: half(x.bfloat16(), 1, text.bfloat16()),
    }


def openvino_variants(options: argparse.Namespace, x: Tensor, text: Tensor) -> dict[str, Call]:
    """OpenVINO in bfloat16, NNCF's int8, and the same with bfloat16 for the rest."""
    import openvino

    files = {name: options.work / f"openvino-{name}.xml" for name in ("float", "int8")}
    if not all(file.exists() for file in files.values()):
        convert(options, x, text, files)
    inputs = {0: x.numpy(), 1: torch.tensor(1).numpy(), 2: text.numpy()}
    variants: dict[str, Call] = {}
    for name, file, precision in (
        ("OpenVINO bfloat16", files["float"], "bf16"),
        ("OpenVINO NNCF int8", files["int8"], "f32"),
        ("OpenVINO NNCF int8, bfloat16", files["int8"], "bf16"),
    ):
        model = openvino.Core().compile_model(
            file,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": options.threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": precision,
            },
        )
        variants[name] = lambda model=model: model(inputs)
    return variants


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
