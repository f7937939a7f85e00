"""Measure the cells of the table of corrections, one artifact under one plan each, and keep them in files."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from call_timing import interleaved_seconds
from compression_table import BATCH_SIZE, artifact_of
from diffusers import DiffusionPipeline
from tally import Tally
from torch import Tensor
from tqdm import tqdm
from work_folder import load_arrays, save_arrays, write_text

from errata import calibration, deploy
from errata.compress import Recipe
from errata.correct import (
    IEC,
    EpsilonScaling,
    Forecast,
    Hindsight,
    Lookahead,
    Plan,
    Refresh,
    SecondOrder,
    fit_forecast,
)
from errata.correct.costs import plain_evaluations
from errata.correct.sampling import FloatSampler, PlanSampler, Sampler, batches_of, default_inputs
from errata.embedded import PIPELINE
from errata.errors import PlanError
from errata.quality import Reference
from errata.report.report_index import FLOAT_KEY, Key
from errata.runtime.schedule import CacheSchedule

MORE_STEPS = "more-steps"
# Plans that an artifact cannot serve are left out of its part of the table. These come first, everywhere;
# "fitted" is a forecast that is fitted to the artifact, see `Bench.plan`.
FITTED = "fitted"
FIRST = {
    "none": Plan.none(),
    "hindsight": Plan(Hindsight()),
    "forecast-1": Plan(Forecast(order=1)),
    "forecast-1+hindsight": Plan(Forecast(order=1)) + Plan(Hindsight()),
    "fitted+hindsight": Plan(Hindsight()),
    "lookahead": Plan(Lookahead()),
    "refresh": Plan(Refresh(), "middle"),
    "refresh+forecast-1+hindsight": Plan(Refresh(), "middle") + Plan(Forecast(order=1)) + Plan(Hindsight()),
    "iec": Plan(IEC(), "all"),
}
LATER = {
    "forecast-2": Plan(Forecast(order=2)),
    "forecast-2+hindsight": Plan(Forecast(order=2)) + Plan(Hindsight()),
    "iec-ends-4": Plan(IEC(), "ends:1/4"),
    "iec-ends-10": Plan(IEC(), "ends:1/10"),
    "iec-ends-20": Plan(IEC(), "ends:1/20"),
    "second-order": Plan(SecondOrder(), "all"),
    "scaling-1.002": Plan(EpsilonScaling(scale=1.002)),
    "scaling-1.005": Plan(EpsilonScaling(scale=1.005)),
}
PLANS = FIRST | LATER
# Images that a forecast is fitted to, and the seed of the first: none that any row is measured on.
FITTED_TO, FITTED_FROM = 32, 1_000_000
# How much dearer than with IEC a run may be and count as equally dear: its steps are whole.
LEEWAY = 1.03
# Calls of each kind that are timed, after others that are not; medians are taken.
WARM_UP_CALLS, TIMED_CALLS = 3, 15


@dataclass(frozen=True)
class Part:
    """Images of one measurement of a row: image i starts from `seed + i`."""

    samples: int
    seed: int


@dataclass
class Bench:
    """The model, the artifacts and the cells that are done."""

    options: Namespace

    def __post_init__(self) -> None:
        self.folder: Path = self.options.work / "correction"
        self.pipe = calibration.load_pipeline(PIPELINE)
        self.pipe.set_progress_bar_config(disable=True)
        self.reference = Reference.embedded()
        self._comparable = comparable_steps(self.pipe.scheduler, self.options.steps)
        self._weights = calibration.model_fingerprint(self.pipe.unet)
        self._cells: dict[tuple[Key, Part], Tally] = {}
        self._manifests: dict[str, dict[str, Any]] = {}
        self._loaded: tuple[Path, deploy.DeployedPipeline] | None = None
        self._costs: dict[str, dict[str, float]] = {}

    def schedule(self, artifact: str) -> CacheSchedule:
        """Return an artifact's cache schedule."""
        return CacheSchedule.from_json(self._manifest(artifact)["schedule"])

    def tallies(self, key: Key, parts: Sequence[Part]) -> list[Tally]:
        """Return a row's tallies by seed; none unless all are there."""
        stored = [self.stored(key, part) for part in parts]
        return [tally for tally in stored if tally is not None] if None not in stored else []

    def stored(self, key: Key, part: Part) -> Tally | None:
        """Return a tally that is there, unless it was made of something else."""
        if (key, part) not in self._cells:
            file = self._file(key, part)
            arrays = load_arrays(file) if file.is_file() else {}
            if not arrays or str(arrays["made_of"]) != self._made_of(key):
                return None
            self._cells[key, part] = Tally.from_arrays(arrays)
        return self._cells[key, part]

    def measure(self, key: Key, part: Part) -> None:
        """Sample one cell and keep it."""
        float_images = None if key == FLOAT_KEY else self._float_images(part)
        sampler = self._sampler(key, part)
        tally = Tally(shown=part.samples if float_images is None else 0)
        batches = batches_of(part.samples, BATCH_SIZE)
        for batch in tqdm(batches, desc=" ".join(key), leave=False, disable=None):
            wanted = None if float_images is None else float_images[batch.start : batch.stop]
            tally.add(sampler.sample(batch), self.reference, float_images=wanted)
        file = self._file(key, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(file, tally.arrays() | {"made_of": np.asarray(self._made_of(key))})

    def plan(self, key: Key) -> Plan:
        """Return a row's plan; a forecast is fitted once and kept."""
        if not key[1].startswith(FITTED):
            return PLANS.get(key[1], Plan.none())
        file = self.folder / FITTED / f"{spelled(key[0])}.json"
        digest = self.digest(key[0])
        fitted = Plan.load(file) if file.is_file() else None
        if fitted is None or fitted.artifact != digest:
            deployed = self.deployed(key[0])
            method = fit_forecast(deployed, samples=FITTED_TO, seed=FITTED_FROM, progress=False)
            fitted = Plan(method, artifact=digest)
            file.parent.mkdir(parents=True, exist_ok=True)
            fitted.save(file)
        return fitted + PLANS[key[1]]

    def costs(self, artifact: str) -> dict[str, float]:
        """Return seconds of a call of each kind and of the float model's, measured once, in one process."""
        if artifact not in self._costs:
            file = self.folder / "costs" / f"{spelled(artifact)}.json"
            digest = self.digest(artifact)
            if not file.is_file() or json.loads(file.read_text())["artifact"] != digest:
                measured = call_seconds(self.deployed(artifact), self.pipe)
                write_text(file, json.dumps({"artifact": digest, "seconds": measured}) + "\n")
            self._costs[artifact] = json.loads(file.read_text())["seconds"]
        return self._costs[artifact]

    def _sampler(self, key: Key, part: Part) -> Sampler:
        steps = self.options.steps
        if key == FLOAT_KEY:
            return FloatSampler(self.pipe, num_inference_steps=steps, seed=part.seed, inputs=default_inputs)
        deployed = self._deployed(key[0], self._steps_of(key))
        return PlanSampler(deployed, self.plan(key), seed=part.seed, inputs=default_inputs)

    def _float_images(self, part: Part) -> Tensor:
        if self.stored(FLOAT_KEY, part) is None:
            self.measure(FLOAT_KEY, part)
        tally = self.stored(FLOAT_KEY, part)
        assert tally is not None  # measured above
        return tally.shown

    def more_steps(self, artifact: str) -> int:
        """Return how many sampler steps "more-steps" takes."""
        return more_steps(artifact, self.schedule(artifact), self.costs(artifact), self._comparable)

    def deployed(self, artifact: str) -> deploy.DeployedPipeline:
        """Return the artifact at the usual number of steps, loaded."""
        return self._deployed(artifact, self.options.steps)

    def digest(self, artifact: str) -> str:
        """Return what names the artifact's bytes."""
        digest: str = self._manifest(artifact)["manifest_sha256"]
        return digest

    def _steps_of(self, key: Key) -> int:
        steps: int = self.options.steps
        return self.more_steps(key[0]) if key[1] == MORE_STEPS else steps

    def _deployed(self, artifact: str, steps: int) -> deploy.DeployedPipeline:
        folder = self._artifact(artifact, steps)
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = (folder, deploy.load(folder))
        return self._loaded[1]

    def _artifact(self, artifact: str, steps: int) -> Path:
        """Return its folder, made unless it is there; calibration does not follow the seed of the images."""
        is_usual = steps == self.options.steps
        work = self.options.work if is_usual else self.options.work / MORE_STEPS / str(steps)
        work.mkdir(parents=True, exist_ok=True)
        return artifact_of(self.pipe, artifact, Namespace(work=work, steps=steps, seed=0))

    def _manifest(self, artifact: str) -> dict[str, Any]:
        if artifact not in self._manifests:
            folder = self._artifact(artifact, self.options.steps)
            manifest = json.loads((folder / "errata.json").read_text(encoding="utf-8"))
            steps = manifest["schedule"]["num_steps"]
            if steps != self.options.steps:
                sys.exit(f"{folder} was made for {steps} steps; choose another --work, or --steps {steps}")
            self._manifests[artifact] = manifest
        return self._manifests[artifact]

    def _made_of(self, key: Key) -> str:
        if key == FLOAT_KEY:
            return json.dumps({"weights": self._weights, "steps": self.options.steps})
        made_of = {"artifact": self.digest(key[0])}
        if key[1] == MORE_STEPS:
            return json.dumps(made_of | {"steps": self._steps_of(key)})
        return json.dumps(made_of | {"plan": self.plan(key).to_json()})

    def _file(self, key: Key, part: Part) -> Path:
        name = f"{key[1]}-seed{part.seed}-samples{part.samples}.npz"
        folder: Path = self.folder / "cells" / spelled(key[0])
        return folder / name


def spelled(artifact: str) -> str:
    """Return the name of a recipe as that of a folder."""
    return artifact.translate(str.maketrans(":=/", "___"))


@torch.no_grad()
def call_seconds(deployed: deploy.DeployedPipeline, pipe: DiffusionPipeline) -> dict[str, float]:
    """Return medians over calls of the artifact and of the float model, timed in turn."""
    denoiser, config = deployed.denoiser, pipe.unet.config
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=generator).to(deployed.pipe.device)
    step = deployed.schedule.num_steps - 1  # a cached one, where there are any
    calls: dict[str, Callable[[], object]] = {
        "float": lambda: pipe.unet(x.to(pipe.device), denoiser.timesteps[step]),
        "full": lambda: denoiser.full(x, step, {}),
    }
    _, feature = denoiser.full(x, step, {})
    if feature is not None:
        calls["cached"] = lambda: denoiser.cached(x, step, {}, feature)
    seconds = interleaved_seconds(calls, TIMED_CALLS, warm_up=WARM_UP_CALLS, clock=clock)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def clock() -> float:
    """Return the time when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def served_plans(wanted: Sequence[str], schedule: CacheSchedule) -> list[str]:
    """Return the plans that the artifact can serve, without those that do there what an earlier one does."""
    served: dict[object, str] = {}
    for name in wanted:
        try:
            placed = PLANS[name].placed(schedule)
        except PlanError:
            continue
        served.setdefault((name.startswith(FITTED), placed), name)
    return list(served.values())


def price(calls: Mapping[Any, float], costs: Mapping[str, float]) -> float:
    """Return the seconds of so many calls of each kind."""
    return sum(number * costs[kind] for kind, number in calls.items())


def plain_price(schedule: CacheSchedule, costs: Mapping[str, float]) -> float:
    """Return the seconds of the calls of an uncorrected run."""
    return price(plain_evaluations(schedule), costs)


def more_steps(
    artifact: str, schedule: CacheSchedule, costs: Mapping[str, float], candidates: Sequence[int]
) -> int:
    """Return the sampler steps at which an uncorrected run costs most nearly what one with IEC costs."""
    wanted = plain_price(schedule, costs) + len(schedule.full_steps) * costs["full"]
    cache = Recipe.named(artifact).cache
    interval = 1 if cache is None or cache.interval is None else cache.interval

    def cost(steps: int) -> float:
        full = -(-steps // interval)
        return price({"full": full, "cached": steps - full} if interval > 1 else {"full": full}, costs)

    return min(candidates, key=lambda steps: (cost(steps) > LEEWAY * wanted, abs(cost(steps) - wanted)))


def comparable_steps(scheduler: Any, steps: int) -> list[int]:
    """Return the numbers of steps, up to twice as many, at which sampling starts from about the same noise.

    The sampler's timesteps are multiples of a whole number, so at most others it leaves out the noisiest.
    """
    scheduler = copy.deepcopy(scheduler)
    tolerance = scheduler.config.num_train_timesteps // 50

    def first(count: int) -> int:
        scheduler.set_timesteps(count)
        return int(scheduler.timesteps[0])

    usual = first(steps)
    return [count for count in range(steps + 1, 2 * steps + 1) if first(count) >= usual - tolerance]
