"""A report on a Ray cluster: one task measures the first batch, many do a share each, and the driver merges.

    pip install "errata[report]" ray
    python examples/cluster/report_ray.py runs/a runs/b --reference photos.npz --features inception \\
        --samples 10000 --shares 16 --gpus 1 --out /shared/runs/report

`--out`, the artifacts and the reference lie where all nodes see them. A task that dies is started again and
goes on with what it had measured; so does the whole script.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errata import calibration, deploy, report
from errata.correct import IEC, Forecast, Hindsight, Plan, Refresh
from errata.quality import open_network

# What to measure; edit them. An artifact without a cache serves only those of IEC.
FREE = Plan(Forecast(order=1)) + Plan(Hindsight())
PLANS = {
    "iec": Plan(IEC()),
    "free": FREE,
    "middle in full": Plan(Refresh(), "middle") + FREE,
}
# Of a task that died with its node, or was preempted.
RETRIES = 5


@dataclass(frozen=True)
class Job:
    """What all shares have in common; plain values, so that it travels."""

    artifacts: tuple[str, ...]
    reference: str
    out: str
    features: str = "digit-features"
    baseline: str | None = None
    samples: int = 256
    batch_size: int = 64
    seed: int = 0
    threads: int = 1

    @property
    def batches(self) -> int:
        """How many there are to share."""
        return -(-self.samples // self.batch_size)


def measure_share(job: Job, index: int, count: int) -> str:
    """Measures every count-th batch, from number `index`; loads all it needs by itself."""
    torch.set_num_threads(job.threads)  # the last bits of a sum on a CPU depend on it
    artifacts = {Path(path).name: deploy.load(path) for path in job.artifacts}
    device = next(iter(artifacts.values())).pipe.device
    reference = report.Reference.open(job.reference, open_network(job.features).to(device))
    reference.network.to(device)  # also that of the embedded reference
    baseline = None if job.baseline is None else calibration.load_pipeline(job.baseline).to(device)
    report.measure(
        artifacts,
        PLANS,
        reference,
        job.out,
        samples=job.samples,
        batch_size=job.batch_size,
        seed=job.seed,
        baseline=baseline,
        shard=report.Shard(index, count),
    )
    return f"share {index} of {count} is measured"


def measure_first_batch(job: Job) -> str:
    """What every run begins with: the costs of the first batch decide which rows there are."""
    return measure_share(job, job.batches, job.batches + 1)  # a share that no batch falls into


def run(job: Job, *, shares: int, gpus: float) -> report.Report:
    """Measures the shares as tasks of the cluster, and merges them."""
    import ray

    ray.init()  # the cluster that RAY_ADDRESS names, or this machine
    wanted = {"num_cpus": job.threads, "num_gpus": gpus, "max_retries": RETRIES}
    print(ray.get(ray.remote(**wanted)(measure_first_batch).remote(job)))
    task: Any = ray.remote(**wanted)(measure_share)
    waiting = [task.remote(job, index, shares) for index in range(shares)]
    while waiting:
        done, waiting = ray.wait(waiting)
        print(*ray.get(done), sep="\n")
    return report.merge([job.out], job.out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A report on a Ray cluster.")
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--reference", required=True, metavar="SOURCE")
    parser.add_argument("--features", default=Job.features, metavar="NETWORK")
    parser.add_argument("--baseline", metavar="PIPELINE")
    parser.add_argument("--samples", type=int, default=Job.samples, metavar="N")
    parser.add_argument("--batch-size", type=int, default=Job.batch_size, metavar="N")
    parser.add_argument("--seed", type=int, default=Job.seed, metavar="N")
    parser.add_argument("--threads", type=int, default=Job.threads, metavar="N", help="of each task")
    parser.add_argument("--shares", type=int, default=16, metavar="N", help="how many tasks there are")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="of each task")
    parser.add_argument("--out", required=True, metavar="DIR")
    options = vars(parser.parse_args(arguments))
    shares, gpus = options.pop("shares"), options.pop("gpus")
    job = Job(**options | {"artifacts": tuple(options["artifacts"])})
    result = run(job, shares=shares, gpus=gpus)
    print(report.text_table(result), f"report: {job.out}/report.html", sep="\n\n")


if __name__ == "__main__":
    main()
