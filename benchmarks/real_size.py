"""Measure time and peak memory of every stage on a UNet of Stable Diffusion's size, random weights.

    python benchmarks/real_size.py --work runs/real_size
    python benchmarks/real_size.py --work runs/sdxl --model sdxl

The first is Stable Diffusion 1.5. Its UNet has its real shape (859.5 M parameters, 64x64 latents, cross
attention 768 wide). The rest of the pipeline does not affect these figures and is small: a class label
replaces the text. The script records one guided trajectory of `--steps` steps, takes W8A8 ranges at those
steps, and learns the rounding of one ResNet block and one transformer block. Seconds are per denoiser step,
so that other runs can be estimated; each stage runs in its own process and reports its peak memory, pages of
mapped files included. For SDXL see `sdxl.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdxl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from errata import calibration, compress, deploy
from errata.compress import LearnedRounding, Quantization, Recipe
from errata.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

# The largest feature maps of the network, hence the dearest blocks.
RESNET = "down_blocks.0.resnets.1"
TRANSFORMER = "down_blocks.0.attentions.1"


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Cost of every stage on a UNet of real size.")
    parser.add_argument(
        "--model", choices=tuple(STAGES), default="sd15", help="architecture (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--iterations", type=int, default=4, help="iterations of learned rounding (default: %(default)s)"
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one stage, or all of them in processes of their own."""
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    stages = STAGES[options.model]
    if options.stage is not None:
        print(json.dumps(timed(stages[options.stage], options)))
        return
    for stage in stages:
        command = [sys.executable, *sys.argv, "--stage", stage]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(
            f"{stage:<22} {result['seconds']:8.1f} s   peak {result['gib']:5.1f} GiB   {result['note']}",
            flush=True,
        )


def timed(stage: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what a stage took."""
    start = time.perf_counter()
    note = stage(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": time.perf_counter() - start, "gib": peak, "note": note}


def make_pipeline(options: argparse.Namespace) -> str:
    """Save the pipeline."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipe = ClassConditionalLDMPipeline(
        unet=unet,
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=64),
        scheduler=DDIMScheduler(clip_sample=False),
        class_embedder=ClassEmbedder(num_classes=10, embedding_dim=768),
    )
    pipe.save_pretrained(options.work / "pipeline")
    return f"{sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.1f} M parameters"


def record(options: argparse.Namespace) -> str:
    """Record one guided trajectory."""
    pipe = calibration.load_pipeline(options.work / "pipeline")
    start = time.perf_counter()
    calibration.calibrate(
        pipe, options.work / "calibration", num_inference_steps=options.steps, num_samples=1, batch_size=1,
        inputs=[{"class_labels": [3]}], guidance_scale=7.5,
    )  # fmt: skip
    return f"{(time.perf_counter() - start) / options.steps:.1f} s a step of one guided sample"


def quantize(options: argparse.Namespace) -> str:
    """W8A8 of the whole network."""
    return apply(options, "w8a8", "w8a8")


def learn(options: argparse.Namespace) -> str:
    """Learned rounding of one ResNet block and one transformer block."""
    config = UNet2DConditionModel.load_config(options.work / "pipeline" / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    kept = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | Attention)
        and not name.startswith((f"{RESNET}.", f"{TRANSFORMER}."))
    ]
    rounding = LearnedRounding(iterations=options.iterations, samples=4, batch_size=2)
    quantization = Quantization(
        weight_bits=4, activation_bits=8, rounding=rounding, modules_to_not_convert=tuple(kept)
    )
    return apply(options, Recipe(quantization=quantization), "learned")


def apply(options: argparse.Namespace, recipe: Recipe | str, name: str) -> str:
    """Compress."""
    pipe = calibration.load_pipeline(options.work / "pipeline")
    recording = calibration.load(options.work / "calibration")
    start = time.perf_counter()
    compress.compress(pipe, recording, recipe, options.work / name)
    return f"compress.compress alone {time.perf_counter() - start:.0f} s"


def freeze(options: argparse.Namespace) -> str:
    """Export the W8A8 artifact."""
    artifact = deploy.deploy(compress.load(options.work / "w8a8"), options.work / "artifact")
    return deploy.verify(artifact).summary()


def run_artifact(options: argparse.Namespace) -> str:
    """Load the artifact and make one guided call."""
    deployed = deploy.load(options.work / "artifact")
    x, text = torch.randn(2, 4, 64, 64), torch.randn(2, 1, 768)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        deployed.denoiser.full(x, 0, {"encoder_hidden_states": text})
        seconds.append(time.perf_counter() - start)
    return f"{seconds[-1]:.1f} s a step of one guided sample"


STAGES: dict[str, dict[str, Callable[[argparse.Namespace], str]]] = {
    "sd15": {
        "make": make_pipeline,
        "calibrate": record,
        "compress w8a8": quantize,
        "compress two blocks": learn,
        "deploy": freeze,
        "one call": run_artifact,
    },
    "sdxl": {
        "make": sdxl.make_pipeline,
        "calibrate": sdxl.record,
        "compress w8a8": quantize,
        "deploy": freeze,
        "generate": sdxl.generate,
    },
}


if __name__ == "__main__":
    main()
