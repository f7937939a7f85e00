"""`load`: a verified artifact becomes a pipeline that samples with low-bit kernels."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from errata.deploy.allowlist import component_class
from errata.deploy.backends import CPU_INT8, BackendRow, check_backend, install
from errata.deploy.components import load_component
from errata.deploy.composition import DENOISER, SCHEDULER, check_composition
from errata.deploy.cpu.fusion import fuse
from errata.deploy.manifest import Manifest
from errata.deploy.sharding import read_tensors
from errata.deploy.step_mapping import nearest_steps, schedule_at, timesteps_at
from errata.deploy.tensors import float_parameters
from errata.deploy.verification import empty_unet, verify
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactMismatchError, first_line
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.feature_correction import FeatureCorrection
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.step_context import StepContext
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
        """The artifact whose diffusers pipeline this is, or a copy of it; None if it is no artifact's."""
        facts = getattr(pipe, _FACTS, None)
        if facts is None or not isinstance(pipe.unet, SteppedUNet):
            return None
        num_inference_steps, manifest, report = facts
        return cls(pipe, num_inference_steps=num_inference_steps, manifest=manifest, report=report)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; arguments are those of the diffusers pipeline.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded, unless `on_mismatch` is "nearest".
        """
        named = self.named(kwargs, args)
        asked = named.get("num_inference_steps", self.num_inference_steps)
        if self.on_mismatch == "nearest" and asked != self.num_inference_steps:
            return self.at_steps(asked)(**named)
        return super().__call__(**named)

    def at_steps(self, num_inference_steps: int) -> DeployedPipeline:
        """The same artifact at another number of sampling steps than recorded; it shares the weights.

        Every call takes the ranges and corrections of the recorded step that is nearest in time; its own time
        is what the network is told. The feature is refreshed once in each of the recorded intervals. What
        that costs in quality was never measured when the artifact was made, hence a warning.

        Raises:
            ArtifactMismatch: the timesteps of that number are not known.
        """
        if num_inference_steps == self.manifest.sampler.num_inference_steps == self.num_inference_steps:
            return self
        if num_inference_steps not in self._at_steps:
            self._at_steps[num_inference_steps] = self._mapped(num_inference_steps)
        return self._at_steps[num_inference_steps]

    def clone(self) -> DeployedPipeline:
        """Another one that shares the weights and nothing else.

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
        """For each quantized layer, which kernel runs it and why."""
        return list(self._report)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    backend: str = "auto",
    on_mismatch: OnMismatch = "error",
) -> DeployedPipeline:
    """Verifies the artifact at `path` and loads it.

    Args:
        path: directory made by `export`.
        device: None means CUDA where there is one, else CPU.
        backend: "auto" picks per layer what is fastest, and computes attention in one fused kernel whose
            softmax output is not quantized; "vnni", "onednn" (CPU) and "triton" (CUDA) use int8 wherever the
            scheme allows and keep to it; "reference" keeps to it in floating point.
        on_mismatch: what a request for another number of steps than recorded does: "error" refuses it,
            "nearest" serves it with the ranges of the nearest recorded steps, and warns; see
            `DeployedPipeline.at_steps`.

    Raises:
        ArtifactError: and its subclasses as in `verify`; or an unknown backend or device.
    """
    if on_mismatch not in get_args(OnMismatch):
        raise ArtifactError(f"unknown on_mismatch {on_mismatch!r}; allowed are 'error' and 'nearest'")
    chosen = _device(device)
    check_backend(backend, chosen)
    root = Path(path)
    manifest = verify(root)
    unet, context = empty_unet(root, manifest), StepContext()
    tensors = _without_mapping(read_tensors(root, manifest), manifest)
    kept = tuple(float_parameters(unet, manifest.scheme))
    report = install(unet, manifest.scheme, tensors, context=context, backend=backend, device=chosen)
    parameters = {name: tensors[name] for name in kept}
    unexpected = unet.load_state_dict(parameters, strict=False, assign=True).unexpected_keys
    assert not unexpected  # `verify` has compared the names; what is missing are the layers installed above
    restore_buffers(unet)
    branched = BranchedUNet(unet.eval().requires_grad_(False).to(chosen))
    if any(row.backend in CPU_INT8 for row in report):
        fused = fuse(unet, context)
        report = [
            replace(row, reason=f"{row.reason}; {fused[row.layer]}") if row.layer in fused else row
            for row in report
        ]
    correction = FeatureCorrection.of(manifest.scheme, tensors)
    denoiser = UNetDenoiser(
        branched, context, manifest.schedule, manifest.sampler.timesteps, correction=correction
    )
    pipe = assembled(root, manifest, SteppedUNet(denoiser, unet.config, module=branched), chosen)
    steps = manifest.sampler.num_inference_steps
    return DeployedPipeline(
        pipe, num_inference_steps=steps, manifest=manifest, report=report, on_mismatch=on_mismatch
    )


def _without_mapping(tensors: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """All but codes as copies: kernels drop the codes, and one small tensor would keep the file in memory."""
    if not manifest.is_quantized:
        return tensors
    return {name: value if name.endswith(".codes") else value.clone() for name, value in tensors.items()}


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "'cpu', 'cuda'" if torch.cuda.is_available() else "'cpu' (there is no CUDA here)"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ArtifactError(f"device {str(device)!r} cannot be used; allowed are {allowed}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ArtifactError(f"device {str(device)!r} is not supported; allowed are {allowed}")
    return chosen


def assembled(root: Path, manifest: Manifest, unet: SteppedUNet, device: torch.device) -> DiffusionPipeline:
    """The diffusers pipeline of a verified artifact around its denoiser.

    Raises:
        ArtifactCorrupt: its components do not make one.
    """
    composition = check_composition(root, manifest)
    name = composition.pipeline.__name__
    components: dict[str, Any] = {DENOISER: unet}
    try:
        for component, entry in composition.components.items():
            if component not in components:
                kind = None if entry is None else component_class(*entry)
                components[component] = None if kind is None else load_component(root / component, kind)
        # `from_pretrained` would look for a UNet of diffusers' own.
        pipe = composition.pipeline(**components, **composition.settings)
    except Exception as error:  # diffusers and transformers raise whatever they like
        reason = first_line(error)
        raise ArtifactCorruptError(f"{root} does not make a {name}: {reason}; deploy again") from error
    # DDIMPipeline turns any scheduler into a DDIMScheduler.
    pipe.register_modules(scheduler=components[SCHEDULER])
    # Everything is on the CPU already, and diffusers warns of half precision there at every move.
    return pipe if device.type == "cpu" else pipe.to(device)


def restore_buffers(unet: nn.Module) -> None:
    """Buffers that no file holds because they follow from the configuration (the K-blocks' blur kernels)."""
    stored = set(unet.state_dict())
    if all(not value.is_meta or name in stored for name, value in unet.named_buffers()):
        return
    with torch.random.fork_rng(devices=[]):
        made = dict(type(unet).from_config(unet.config).named_buffers())  # type: ignore[attr-defined]
    for name, value in list(unet.named_buffers()):
        if value.is_meta and name not in stored:
            owner, _, leaf = name.rpartition(".")
            unet.get_submodule(owner)._buffers[leaf] = made[name]
