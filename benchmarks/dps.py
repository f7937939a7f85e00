"""Time the search for a cache schedule at the size of ImageNet's LDM-4 and 250 steps, with random weights.

    python benchmarks/dps.py [--steps 250] [--interval 10] [--rows 2] [--calls 2]

The three parts are timed apart:

- collection: calls of the float UNet (its real shape: 3x64x64 latents, feature maps 192x64x64), timed a few
  times and multiplied by the number of steps;
- distances: the cost matrix, accumulated over all steps; the feature maps are one from the UNet plus growing
  noise, since their content does not change the time;
- search: dynamic programming over the finished matrix.

A row is one input of the UNet; with guidance each sample has two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from errata.compress.cache.cache_features import add_distances
from errata.compress.cache.dps import cost_of, search
from errata.machine import describe_machine
from errata.runtime.schedule import uniform_steps
from errata.runtime.unet import BranchedUNet


def main() -> None:
    """Measure and print one line for each part."""
    parser = argparse.ArgumentParser(description="Cost of the search for a cache schedule.")
    parser.add_argument("--steps", type=int, default=250, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--interval", type=int, default=10, help="mean interval between full steps (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=2, help="inputs of the UNet per batch (default: %(default)s)"
    )
    parser.add_argument("--calls", type=int, default=2, help="timed calls of the UNet (default: %(default)s)")
    options = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"T={options.steps}, N={options.interval}, {options.rows} rows; seconds")
    call, feature = collect(options.rows, options.calls)
    print(f"collection  {call * options.steps:10.1f}   {call:.2f} a call, times {options.steps} steps")
    distances, seconds = accumulate(feature, options.steps, options.interval)
    kept = min(options.steps, 2 * options.interval - 1) * feature.numel() * 4 / 2**20
    print(f"distances   {seconds:10.1f}   {kept:.0f} MiB of feature maps {list(feature.shape)} kept")
    found, seconds = timed(lambda: search(distances, options.interval))
    uniform = uniform_steps(options.steps, interval=options.interval)
    share = cost_of(distances, found) / cost_of(distances, uniform)
    print(f"search      {seconds:10.4f}   {len(found)} full steps, {share:.3f} of the cost of uniform ones")


@torch.no_grad()
def collect(rows: int, calls: int) -> tuple[float, Tensor]:
    """Median seconds of a call, and a feature map."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=(6, 12, 18, 30), cross_attention_dim=512,
    ).eval()  # fmt: skip
    model, x = BranchedUNet(unet), torch.randn(rows, 3, 64, 64)
    cond = {"encoder_hidden_states": torch.randn(rows, 1, 512)}
    results = [timed(lambda: model.full(x, 500.0, cond, branch=1)) for _ in range(calls + 1)]
    feature = results[0][0][1]
    assert feature is not None
    return statistics.median(seconds for _, seconds in results[1:]), feature


def accumulate(feature: Tensor, steps: int, interval: int) -> tuple[Tensor, float]:
    """The cost matrix `(T, 2N)` of feature maps that drift fast in the middle of the run, and its seconds."""
    distances = torch.zeros(steps, 2 * interval, dtype=torch.float64)
    latest: deque[Tensor] = deque(maxlen=2 * interval - 1)
    noise, total = torch.randn_like(feature), 0.0
    for step in range(steps):
        drift = 0.01 + 0.1 * torch.exp(torch.tensor(-((step / steps - 0.5) ** 2) / 0.02))
        feature = feature + drift * noise.roll(step, dims=-1)
        _, seconds = timed(
            lambda feature=feature, step=step: add_distances(distances, feature, latest, step=step)
        )
        total += seconds
    return distances, total


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
