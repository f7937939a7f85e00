"""How far an artifact's trajectories drift from the float model's, uncorrected and under plans.

Source: "Iterative Error Correction", Fig. 2, which does not say which error it plots against the step. Here
it is ‖x - x_float‖ of the sample that each step returns, from equal noise, and that as a part of ‖x_float‖.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.analysis import figures
from errata.correct.analysis.values import Values, require_whole
from errata.correct.analysis.watch import SamplerStep, WatchedArtifact, arguments_for, watch_calls
from errata.correct.pipeline import wrap
from errata.correct.plans import Plan
from errata.correct.sampling import Inputs, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError

UNCORRECTED = "uncorrected"
"""Name of the artifact's own trajectory among those of the plans."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """Made by `trajectory_error`; errors of what step i of the scheduler returns, per sample.

    Attributes:
        timesteps: that the pipeline passed to the scheduler.
        rms: by the name of the plan, the root mean square of x - x_float, in the units of the sample.
        relative: likewise, ‖x - x_float‖ / ‖x_float‖.
    """

    timesteps: tuple[float, ...]
    rms: Mapping[str, Values]
    relative: Mapping[str, Values]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {
            "type": "TrajectoryError",
            "version": 1,
            "timesteps": list(self.timesteps),
            "rms": {name: values.to_json() for name, values in self.rms.items()},
            "relative": {name: values.to_json() for name, values in self.relative.items()},
        }

    def plot(self, path: str | Path) -> Path:
        """Plot the mean relative errors against the step into `path`, whose suffix chooses the format.

        Raises:
            ReportError: matplotlib is not installed, or cannot write that format.
        """
        with figures.drawn(path, panels=1) as (axes,):
            for (name, values), (color, dashes) in zip(
                self.relative.items(), figures.series(len(self.relative)), strict=True
            ):
                places = range(len(self.timesteps))
                figures.draw_line(axes, places, values.mean, color=color, name=name, dashes=dashes)
            axes.set_yscale("log")
            axes.set_xlabel("sampling step")
            figures.label(axes, "distance from the float model's trajectory", "‖x - x_float‖ / ‖x_float‖")
            figures.name_lines(axes)
        return Path(path)


def trajectory_error(
    deployed: DeployedPipeline,
    reference_pipe: DiffusionPipeline,
    *,
    plans: Mapping[str, Plan],
    samples: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    inputs: Inputs = default_inputs,
) -> TrajectoryError:
    """Return the errors of the artifact, alone and under each plan, against the float model from equal noise.

    No object of the caller is changed. The float model runs with a copy of the artifact's scheduler.

    Args:
        deployed: a loaded artifact.
        reference_pipe: the float pipeline that it came from.
        plans: by the names that the result uses; `UNCORRECTED` is reserved.
        samples: how many trajectories.
        batch_size: most samples of one run.
        seed: sample i starts from noise that depends on `seed + i` alone.
        inputs: keyword arguments of the pipelines for samples of given indices, such as prompts.

    Raises:
        PlanError: an argument is out of range, the two pipelines do not start from the same noise or do not
            take the same steps, or a plan cannot serve the artifact.
    """
    if UNCORRECTED in plans:
        raise PlanError(f"plans has the name {UNCORRECTED!r}, which is reserved; give that plan another name")
    require_whole("samples", samples)
    require_whole("batch_size", batch_size)
    record = _Record()
    runs = {UNCORRECTED: _artifact_run(deployed, None, record)}
    runs |= {name: _artifact_run(deployed, plan, record) for name, plan in plans.items()}
    float_run = _float_run(deployed, reference_pipe, record)
    squares: dict[str, list[Tensor]] = {name: [] for name in runs}
    sizes: list[Tensor] = []
    dimension = 0
    for indices in batches_of(samples, batch_size):
        expected = record.of(float_run, deployed.pipe, indices, seed, inputs)
        sizes.append(torch.stack([_squares(step.result) for step in expected], dim=0))
        dimension = expected[0].result[0].numel()
        for name, run in runs.items():
            taken = record.of(run, deployed.pipe, indices, seed, inputs)
            _require_comparable(taken, expected, name)
            pairs = zip(taken, expected, strict=True)
            squares[name].append(torch.stack([_squares(one.result, other.result) for one, other in pairs]))
    errors = {name: torch.cat(parts, dim=1).sqrt() for name, parts in squares.items()}
    norm = torch.cat(sizes, dim=1).sqrt()
    return TrajectoryError(
        timesteps=tuple(step.timestep for step in expected),
        rms={name: _values(error / dimension**0.5) for name, error in errors.items()},
        relative={name: _values(error / norm) for name, error in errors.items()},
    )


class _Record:
    """The steps of the latest call; every run of a comparison reports its steps here."""

    def __init__(self) -> None:
        self._steps: list[SamplerStep] = []

    def add(self, step: SamplerStep) -> None:
        self._steps.append(step)

    def of(
        self, run: Callable[..., Any], pipe: DiffusionPipeline, indices: range, seed: int, inputs: Inputs
    ) -> list[SamplerStep]:
        """Return the steps of a call of `run` for these samples."""
        self._steps = []
        run(**arguments_for(pipe, indices, seed=seed, inputs=inputs))
        return self._steps


def _artifact_run(deployed: DeployedPipeline, plan: Plan | None, record: _Record) -> Callable[..., Any]:
    artifact = WatchedArtifact(deployed, record.add)
    return artifact if plan is None else wrap(artifact, plan)


def _float_run(
    deployed: DeployedPipeline, reference_pipe: DiffusionPipeline, record: _Record
) -> Callable[..., Any]:
    if not isinstance(reference_pipe, DiffusionPipeline):
        raise PlanError(
            f"the reference is a {type(reference_pipe).__name__}; pass the float diffusers pipeline that the "
            "artifact was made from"
        )
    private = copy.copy(reference_pipe)
    private.scheduler = copy.deepcopy(deployed.pipe.scheduler)
    watch_calls(private, record.add)

    def run(**arguments: Any) -> Any:
        return private(**deployed.arguments(arguments))

    return run


def _require_comparable(taken: list[SamplerStep], expected: list[SamplerStep], name: str) -> None:
    if [step.timestep for step in taken] != [step.timestep for step in expected]:
        raise PlanError(
            f"{name}: the artifact took {len(taken)} steps, the reference {len(expected)}, or at other "
            "timesteps; pass the pipeline that the artifact was made from"
        )
    one, other = taken[0].sample, expected[0].sample
    if one.shape != other.shape or not torch.allclose(one.double().cpu(), other.double().cpu(), rtol=1e-3):
        raise PlanError(
            f"{name}: the artifact and the reference start from different noise ({list(one.shape)} and "
            f"{list(other.shape)}); pass the pipeline that the artifact was made from"
        )


def _squares(one: Tensor, other: Tensor | None = None) -> Tensor:
    """Return ‖one - other‖² of each sample, `(B,)`, float64 on the CPU."""
    difference = one.double().cpu() - (0 if other is None else other.double().cpu())
    return difference.flatten(1).square().sum(dim=1)


def _values(errors: Tensor) -> Values:
    return Values(tuple(tuple(row) for row in errors.tolist()))
