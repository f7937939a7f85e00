"""A calibration on a Ray cluster: tasks record a share each, and the driver merges.

    pip install "errata[report]" ray
    python examples/cluster/calibrate_ray.py google/ddpm-cifar10-32 --steps 100 --samples 512 \\
        --shares 16 --gpus 1 --out /shared/runs/calibration

`--out` and a local pipeline lie where all nodes see them. A task that dies is started again and goes on with
what it had recorded; so does the whole script.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errata import calibration

# Of a task that died with its node, or was preempted.
RETRIES = 5


@dataclass(frozen=True)
class Job:
    """What all shares have in common; plain values, so that it travels."""

    pipeline: str
    out: str
    steps: int = 100
    samples: int = 512
    batch_size: int = 64
    seed: int = 0
    prompts: tuple[str, ...] | None = None
    guidance_scale: float | None = None
    threads: int = 1


def record_share(job: Job, index: int, count: int) -> str:
    """Records every count-th batch, from number `index`; loads all it needs by itself."""
    torch.set_num_threads(job.threads)  # the last bits of a sum on a CPU depend on it
    calibration.record_share(
        calibration.load_pipeline(job.pipeline),
        job.out,
        shard=calibration.Shard(index, count),
        num_inference_steps=job.steps,
        num_samples=job.samples,
        batch_size=job.batch_size,
        seed=job.seed,
        prompts=job.prompts,
        guidance_scale=job.guidance_scale,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return f"share {index} of {count} is recorded"


def run(job: Job, *, shares: int, gpus: float) -> calibration.CalibrationSet:
    """Records the shares as tasks of the cluster, and merges them."""
    import ray

    ray.init()  # the cluster that RAY_ADDRESS names, or this machine
    task: Any = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_retries=RETRIES)(record_share)
    waiting = [task.remote(job, index, shares) for index in range(shares)]
    while waiting:
        done, waiting = ray.wait(waiting)
        print(*ray.get(done), sep="\n", flush=True)
    return calibration.merge([job.out], job.out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A calibration on a Ray cluster.")
    parser.add_argument("pipeline", metavar="PIPELINE")
    parser.add_argument("--steps", type=int, default=Job.steps, metavar="N")
    parser.add_argument("--samples", type=int, default=Job.samples, metavar="N")
    parser.add_argument("--batch-size", type=int, default=Job.batch_size, metavar="N")
    parser.add_argument("--seed", type=int, default=Job.seed, metavar="N")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--guidance-scale", type=float, metavar="G")
    parser.add_argument("--threads", type=int, default=Job.threads, metavar="N", help="of each task")
    parser.add_argument("--shares", type=int, default=16, metavar="N", help="how many tasks there are")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="of each task")
    parser.add_argument("--out", required=True, metavar="DIR")
    options = vars(parser.parse_args(arguments))
    shares, gpus = options.pop("shares"), options.pop("gpus")
    if options["prompts"] is not None:
        lines = options["prompts"].read_text(encoding="utf-8").splitlines()
        options["prompts"] = tuple(filter(None, lines))
    recorded = run(Job(**options), shares=shares, gpus=gpus)
    print(f"calibration: {recorded.path}, {recorded.num_samples} trajectories")


if __name__ == "__main__":
    main()
