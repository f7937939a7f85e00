"""`load`: a verified engine directory becomes a pipeline that samples and can be corrected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from errata.deploy.assembly import assembled
from errata.deploy.engines.manifest import EngineManifest
from errata.deploy.engines.onnx_graphs import CACHED, FEATURE, FULL, SAMPLE, STEP
from errata.deploy.engines.runtime import Session
from errata.deploy.engines.verification import as_artifact, feature_tables, float_network, verify
from errata.deploy.kernel_registry import BackendRow
from errata.deploy.pipeline import DeployedPipeline
from errata.runtime.denoiser import Conditioning, check_measurable, measured_costs
from errata.runtime.feature_correction import FeatureCorrection
from errata.runtime.schedule import CacheSchedule, StepKind
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.weight_formats import weight_format

_FILES: dict[StepKind, str] = {"full": FULL, "cached": CACHED}


def load(path: str | Path) -> DeployedPipeline:
    """Verify the engine directory at `path`, then load it; it runs on the CPU.

    The pipeline is called and corrected like that of an artifact. It takes samples and conditions of the
    sizes that it was exported for, in any number. Other numbers of sampling steps cannot be mapped to it.

    Raises:
        ArtifactError: and its subclasses as in `verify`; or onnxruntime is not installed.
    """
    root = Path(path)
    manifest = verify(root)
    network = float_network(root, manifest)
    unet = SteppedUNet(make_denoiser(root, manifest), network.config, stands_for=type(network))
    return DeployedPipeline(
        assembled(root, as_artifact(manifest), unet, torch.device("cpu")),
        num_inference_steps=manifest.sampler.num_inference_steps,
        manifest=manifest,
        report=_report(manifest),
    )


def make_denoiser(root: Path, manifest: EngineManifest) -> EngineDenoiser:
    """Return what the graphs of a verified engine evaluate.

    Raises:
        ArtifactError: onnxruntime cannot run them, or is not installed.
    """
    graphs = {
        kind: Session(root / file, manifest.graphs[file])
        for kind, file in _FILES.items()
        if file in manifest.graphs
    }
    correction = FeatureCorrection.of(manifest.scheme, feature_tables(root, manifest))
    return EngineDenoiser(graphs, manifest.schedule, manifest.sampler.timesteps, correction=correction)


def _report(manifest: EngineManifest) -> list[BackendRow]:
    scheme = manifest.scheme
    corrected = {layer.name for layer in scheme.correction.layers} if scheme.correction is not None else set()
    rows = []
    for layer in scheme.layers:
        backend, reason = _kernel(manifest.form, is_quantized=layer.activation_bits is not None)
        stored_as = weight_format(layer.weight_bits)
        if stored_as.is_packed:
            reason += f"; {stored_as.name} weights were unpacked to int8 at export"
        if layer.name in corrected:
            reason += "; output corrected in cached calls"
        rows.append(
            BackendRow(
                layer=layer.name, kind=layer.kind, scheme=layer.label(), backend=backend, reason=reason
            )
        )
    backend, reason = _kernel(manifest.form, is_quantized=True)
    return rows + [
        BackendRow(
            layer=f"{attention.name} (matmuls)",
            kind="attention",
            scheme=f"a{attention.bits}",
            backend=backend,
            reason=reason,
        )
        for attention in scheme.attentions
    ]


def _kernel(form: str, *, is_quantized: bool) -> tuple[str, str]:
    if not is_quantized:
        return "onnxruntime float", "weights dequantized at each call, float product"
    if form == "qdq":
        return "onnxruntime float", (
            "inputs are quantized to 8 bits, the product is in floating point; int8 in OpenVINO and TensorRT"
        )
    return "onnxruntime int8", "int8 product"


class EngineDenoiser:
    """A `Denoiser` made of exported graphs.

    A cached call reads a stored feature through `correction`, where there is one.

    Args:
        graphs: the session of each kind of call; "cached" is there exactly where the schedule has a cache.
        schedule: of the calls of a run.
        timesteps: of those calls; the graphs know them, too.
        correction: of the feature that cached calls read. It stays outside the graph, because it does not
            apply to features that were extrapolated.
    """

    def __init__(
        self,
        graphs: Mapping[StepKind, Session],
        schedule: CacheSchedule,
        timesteps: tuple[float, ...],
        *,
        correction: FeatureCorrection | None = None,
    ) -> None:
        self._graphs = graphs
        self._schedule = schedule
        self._timesteps = timesteps
        self._correction = correction
        self._latest: tuple[Tensor, Conditioning] | None = None
        self._costs: dict[tuple[StepKind, torch.Size], float] = {}

    @property
    def schedule(self) -> CacheSchedule:
        """Which steps a plain run evaluates in full."""
        return self._schedule

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Training time of every recorded call."""
        return self._timesteps

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`.

        Raises:
            ValueError: the step was not recorded.
            ArtifactMismatchError: an input is not as the engine was exported for.
        """
        prediction, *features = self._graphs["full"](self._inputs(x, step, cond))
        self._latest = (x, cond)
        return prediction.to(x.device, x.dtype), features[0].to(x.device) if features else None

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`.

        Raises:
            ValueError: the model has no cache, or the step was not recorded.
            ArtifactMismatchError: an input is not as the engine was exported for.
        """
        if not self._schedule.has_cache:
            raise ValueError("this model has no feature cache: every step is a full one")
        inputs = self._inputs(x, step, cond)
        if self._correction is not None and not is_extrapolated:
            feature = self._correction(feature, step)
        (prediction,) = self._graphs["cached"]({**inputs, FEATURE: feature})
        self._latest = (x, cond)
        return prediction.to(x.device, x.dtype)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """See `Denoiser.cost`; measured once per shape, both kinds in turn.

        Raises:
            ValueError: no call has been made yet, so no shape is known; or there are no cached calls.
        """
        check_measurable(kind, self._schedule, has_shape=self._latest is not None)
        assert self._latest is not None
        latest = x, cond = self._latest
        if batch_size is not None and batch_size != len(x):
            rows = {spec.name for spec in self._graphs["full"].spec.inputs if None in spec.shape}
            x = _repeated(x, batch_size)
            cond = {
                name: _repeated(value, batch_size) if name in rows else value for name, value in cond.items()
            }
        if (kind, x.shape) not in self._costs:
            seconds = measured_costs(self, x, cond)
            self._costs |= {(each, x.shape): value for each, value in seconds.items()}
            self._latest = latest
        return self._costs[kind, x.shape]

    def _inputs(self, x: Tensor, step: int, cond: Conditioning) -> dict[str, Tensor]:
        if not 0 <= step < self._schedule.num_steps:
            raise ValueError(f"step {step} was not recorded; allowed are 0 to {self._schedule.num_steps - 1}")
        return {SAMPLE: x, STEP: torch.tensor(step), **cond}


def _repeated(value: Tensor, rows: int) -> Tensor:
    return value[:1].expand(rows, *value.shape[1:])
