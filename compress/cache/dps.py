"""Dynamic programming of the cache schedule (DPS): which steps are full.

    symbol     here            meaning
    T          num_steps       sampler steps of a run, of one denoiser call each, or of several
    N          interval        ⌈T/N⌉ of them are full
    F_i        feature         the cached feature at step i, one for each of its calls
    [s, e)     group           a full step s and the cached ones that read its feature
    D[s, k]    distances       ‖F_{s+k} - F_s‖₁, between calls of the same stream, summed over the streams
    C[s, L]    costs           cost of the group of L steps that starts at s: Σ_{k<L} D[s, k]

Source: CacheQuant (Liu et al., CVPR 2025), section 3.2.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.cache.cache_features import feature_distances
from errata.runtime.recipes.caching import CacheQuant, group_lengths
from errata.runtime.schedule import CacheSchedule, calls_of, uniform_steps


def search_schedule(
    unet: nn.Module, calibration_set: CalibrationSet, cache: CacheQuant, branch: int
) -> CacheSchedule:
    """Return the schedule that `cache` means for this float UNet, searched on its recorded trajectories.

    Args:
        unet: the float network; left alone.
        calibration_set: its trajectories.
        cache: interval, and whether to search at all.
        branch: resnets that a cached step recomputes; it decides what the cached feature is.
    """
    per_step, interval = calibration_set.calls_per_step, cache.interval
    num_steps = calibration_set.num_steps // per_step
    full_steps = uniform_steps(num_steps, interval=interval)
    if cache.search == "dps" and 1 < len(full_steps) < num_steps:  # else there is nothing to choose
        distances = feature_distances(unet, calibration_set, branch=branch, interval=interval)
        full_steps = search(distances, interval)
    return CacheSchedule(
        num_steps=calibration_set.num_steps,
        full_steps=calls_of(full_steps, calls_per_step=per_step),
        branch=branch,
        calls_per_step=per_step,
    )


def search(distances: Tensor, interval: int) -> tuple[int, ...]:
    """Return the full steps of least cost: `⌈T/N⌉` groups of `⌈N/2⌉` to `2N` steps; exact.

    Uniform steps are taken where they cost less, which only a last group shorter than `⌈N/2⌉` can bring
    about. A run shorter than `⌈N/2⌉` is one group.

    Args:
        distances: `(T, W)`, `distances[s, k] = ‖F_{s+k} - F_s‖₁`; `W` is at least the smaller of `T`, `2N`.
            Entries beyond the run are not read.
        interval: N.

    Raises:
        ValueError: `distances` does not reach that far.
    """
    num_steps, (shortest, longest) = len(distances), group_lengths(interval)
    longest = min(longest, num_steps)
    if distances.ndim != 2 or distances.shape[1] < longest:
        raise ValueError(f"distances are {list(distances.shape)}; needed are {longest} columns or more")
    if num_steps < shortest:
        return (0,)
    costs = distances[:, :longest].double().cumsum(dim=1)[:, shortest - 1 :]  # of lengths shortest, …
    full_steps = _best_partition(costs, count=ceil(num_steps / interval), shortest=shortest)
    uniform = uniform_steps(num_steps, interval=interval)
    return uniform if cost_of(distances, uniform) < cost_of(distances, full_steps) else full_steps


def cost_of(distances: Tensor, full_steps: tuple[int, ...]) -> float:
    """Return the cost of a schedule: `Σ_groups Σ_k ‖F_{s+k} - F_s‖₁`; `distances` as in `search`."""
    ends = (*full_steps[1:], len(distances))
    return sum(
        float(distances[start, : end - start].double().sum())
        for start, end in zip(full_steps, ends, strict=True)
    )


def _best_partition(costs: Tensor, *, count: int, shortest: int) -> tuple[int, ...]:
    """Start of every group. `best[e]` is the least cost of cutting `[0, e)` into the groups so far:

    best_g[e] = min over L of best_{g-1}[e - L] + C[e - L, L].
    """
    num_steps, choices = costs.shape
    ends = torch.arange(num_steps + 1)[:, None]
    starts = ends - torch.arange(shortest, shortest + choices)  # (T + 1, choices)
    is_inside = starts >= 0
    starts = starts.clamp(min=0)
    last_cost = costs[starts, torch.arange(choices)].masked_fill(~is_inside, torch.inf)
    best = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen = []
    for _ in range(count):
        best, choice = (best[starts] + last_cost).min(dim=1)
        chosen.append(choice)
    end, full_steps = num_steps, list[int]()
    for choice in reversed(chosen):
        end = int(starts[end, choice[end]])
        full_steps.append(end)
    return tuple(reversed(full_steps))
