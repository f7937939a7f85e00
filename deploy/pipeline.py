"""`DeployedPipeline`: a loaded artifact, called like the diffusers pipeline that it came from."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

from diffusers import DiffusionPipeline

from errata.deploy.kernel_registry import BackendRow
from errata.deploy.manifest import Manifest
from errata.errors import ArtifactMismatchError
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.sampler import timesteps_at
from errata.runtime.schedule import nearest_steps, schedule_at
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet import BranchedUNet

OnMismatch = Literal["error", "nearest"]

# On a diffusers pipeline that is an artifact's: what was loaded beside it.
_FACTS = "_errata_facts"


class DeployedPipeline(SteppedPipeline):
    """A frozen artifact, ready to sample; called like the diffusers pipeline that it came from.

    Attributes:
        pipe: that diffusers pipeline with the low-bit UNet in place. Called directly it makes full calls
            only; call the `DeployedPipeline` itself to use the cache schedule.
        manifest: what the artifact says of itself.
        on_mismatch: what a call with another number of steps than recorded does, see `load`.
    """

    _way_out = ", sample or correct deployed.at_steps(…)"

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        num_inference_steps: int,
        manifest: Manifest,
        report: list[BackendRow],
        on_mismatch: OnMismatch = "error",
    ) -> None:
        super().__init__(pipe, num_inference_steps=num_inference_steps)
        self.manifest = manifest
        self.on_mismatch = on_mismatch
        self._report = report
        self._at_steps: dict[int, DeployedPipeline] = {}
        # Not `self`: a circle would keep the weights in memory until it is collected.
        setattr(pipe, _FACTS, (num_inference_steps, manifest, report))

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> DeployedPipeline | None:
        """Return the artifact that a diffusers pipeline, or a copy of it, belongs to; None without one."""
        facts = getattr(pipe, _FACTS, None)
        if facts is None or not isinstance(pipe.unet, SteppedUNet):
            return None
        num_inference_steps, manifest, report = facts
        return cls(pipe, num_inference_steps=num_inference_steps, manifest=manifest, report=report)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; arguments are those of the diffusers pipeline.

        Raises:
            ArtifactMismatchError: another `num_inference_steps` than recorded, and `on_mismatch` is "error".
        """
        named = self.named(kwargs, args)
        asked = named.get("num_inference_steps", self.num_inference_steps)
        if self.on_mismatch == "nearest" and asked != self.num_inference_steps:
            return self.at_steps(asked)(**named)
        return super().__call__(**named)

    def at_steps(self, num_inference_steps: int) -> DeployedPipeline:
        """Return the same artifact at another number of sampling steps than recorded; it shares the weights.

        Every call takes the ranges and corrections of the recorded step that is nearest in time; its own time
        is what the network is told. The feature is refreshed once in each of the recorded intervals. What
        that costs in quality was never measured when the artifact was made, hence a warning.

        Raises:
            ArtifactMismatchError: the timesteps of that number are not known.
        """
        if num_inference_steps == self.manifest.sampler.num_inference_steps == self.num_inference_steps:
            return self
        if num_inference_steps not in self._at_steps:
            self._at_steps[num_inference_steps] = self._mapped(num_inference_steps)
        return self._at_steps[num_inference_steps]

    def clone(self) -> DeployedPipeline:
        """Return another one that shares the weights and nothing else.

        Calls of one loaded artifact take turns, even in several threads; those of a clone run beside them.
        """
        pipe = copy.copy(self.pipe)
        stepped: SteppedUNet = pipe.unet
        shared = {id(value): value for value in (*stepped.parameters(), *stepped.buffers())}
        pipe.unet = copy.deepcopy(stepped, shared)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return DeployedPipeline(
            pipe,
            num_inference_steps=self.num_inference_steps,
            manifest=self.manifest,
            report=self._report,
            on_mismatch=self.on_mismatch,
        )

    def _mapped(self, num_inference_steps: int) -> DeployedPipeline:
        denoiser, sampler = self.denoiser, self.manifest.sampler
        calls = denoiser.schedule.calls_per_step
        if not isinstance(denoiser, UNetDenoiser):
            raise ArtifactMismatchError(
                f"num_inference_steps={num_inference_steps}: only an artifact's own network can be mapped to "
                f"other steps; sample with {self.num_inference_steps}"
            )
        timesteps = timesteps_at(
            self.pipe.scheduler, sampler, calls_per_step=calls, steps=num_inference_steps
        )
        nearest = nearest_steps(timesteps, sampler.timesteps, calls_per_step=calls)
        off = max(abs(time - sampler.timesteps[step]) for time, step in zip(timesteps, nearest, strict=True))
        warnings.warn(
            f"sampling with {num_inference_steps} steps; {sampler.num_inference_steps} were recorded. Each "
            f"takes the activation ranges of the nearest recorded step, at most {off:g} in time away; for "
            f"ranges of its own, calibrate with num_inference_steps={num_inference_steps}",
            UserWarning,
            stacklevel=4,
        )
        schedule = schedule_at(self.manifest.schedule, nearest)
        pipe = copy.copy(self.pipe)
        pipe.unet = SteppedUNet(
            denoiser.at(schedule, timesteps, nearest), pipe.unet.config, module=pipe.unet.module
        )
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return DeployedPipeline(
            pipe, num_inference_steps=num_inference_steps, manifest=self.manifest, report=self._report
        )

    def backend_report(self) -> list[BackendRow]:
        """Return for each quantized layer which kernel runs it, and why.

        Where whole calls can run as one native program, a last row, of kind "calls", tells whether those of
        the shapes seen so far do.
        """
        network: BranchedUNet | None = self.pipe.unet.module
        if network is None or not (plan := network.plan()):
            return list(self._report)
        backend = "program" if network.runs_programs else "layers"
        row = BackendRow(layer="(network)", kind="calls", scheme="", backend=backend, reason=plan)
        return [*self._report, row]
