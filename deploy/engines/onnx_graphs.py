"""The graphs of an artifact, written as ONNX: a full call, and the cached one that reads its feature."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from errata.deploy.engines.runtime import needed
from errata.deploy.manifest import Manifest
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

# The oldest that onnxruntime's int8 products need nothing newer than, so that old runtimes can read it.
OPSET = 17
FULL, CACHED = "full.onnx", "cached.onnx"
SAMPLE, STEP, FEATURE, PREDICTION = "sample", "step", "feature", "prediction"


class _Graph(nn.Module):
    """What both graphs share: the network, its step context, and the timestep of each step."""

    def __init__(
        self, network: BranchedUNet, context: StepContext, manifest: Manifest, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.network = network
        self.context = context
        self.branch = manifest.schedule.branch
        self.names = tuple(names)
        self.times: Tensor
        self.register_buffer("times", _as_scheduled(manifest.sampler.timesteps))

    def _named(self, cond: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, cond, strict=True))


class FullGraph(_Graph):
    """Prediction and, with a cache, the feature."""

    def forward(self, sample: Tensor, step: Tensor, *cond: Tensor) -> tuple[Tensor, ...]:
        """See `Denoiser.full`."""
        with self.context.at(step):
            prediction, feature = self.network.full(
                sample, self.times[step], self._named(cond), branch=self.branch
            )
        return (prediction,) if feature is None else (prediction, feature)


class CachedGraph(_Graph):
    """Prediction from a feature that is corrected already."""

    def forward(self, sample: Tensor, step: Tensor, feature: Tensor, *cond: Tensor) -> Tensor:
        """See `Denoiser.cached`."""
        with self.context.at(step, kind="cached"):
            return self.network.cached(
                sample, self.times[step], self._named(cond), feature, branch=self.branch
            )


@torch.no_grad()
def write_graphs(
    network: BranchedUNet,
    context: StepContext,
    manifest: Manifest,
    sample: Tensor,
    cond: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Writes `full.onnx` and, with a cache, `cached.onnx` into `folder`.

    Args:
        network: with the layers of `install_engine_layers`, which read `context`.
        context: see there.
        manifest: of the artifact.
        sample: `(B, C, H, W)`, an input; the graphs take any number of samples of that size.
        cond: the other inputs of that call. Those whose first dimension is B have one entry for each sample.
        folder: an existing directory.
    """
    step = torch.tensor(0)
    full = FullGraph(network, context, manifest, names=tuple(cond)).eval()
    outputs = full(sample, step, *cond.values())
    named = dict(zip((PREDICTION, FEATURE), outputs, strict=False))
    _write(full, {SAMPLE: sample, STEP: step, **cond}, named, folder / FULL)
    if FEATURE in named:
        cached = CachedGraph(network, context, manifest, names=tuple(cond)).eval()
        inputs = {SAMPLE: sample, STEP: step, FEATURE: named[FEATURE], **cond}
        _write(cached, inputs, {PREDICTION: named[PREDICTION]}, folder / CACHED)


def _write(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], file: Path) -> None:
    rows = len(inputs[SAMPLE])
    with warnings.catch_warnings():
        # The exporter that traces is deprecated in torch 2.13, and tells of each size that it takes as fixed.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={
                name: {0: "batch"} for name, value in {**inputs, **outputs}.items() if has_rows(value, rows)
            },
            opset_version=OPSET,
            dynamo=False,
            # With it, torch 2.13 fails to trace a function that uses the same argument twice.
            autograd_inlining=False,
        )
    _state_sizes(file, outputs, rows)


def _state_sizes(file: Path, outputs: Mapping[str, Tensor], rows: int) -> None:
    """The exporter leaves the sizes of outputs open, because it knows them of no node of another domain."""
    onnx = needed("onnx")
    model = onnx.load(str(file), load_external_data=False)
    for end in model.graph.output:
        value, sizes = outputs[end.name], end.type.tensor_type.shape
        sizes.ClearField("dim")
        for axis, size in enumerate(value.shape):
            if axis == 0 and has_rows(value, rows):
                sizes.dim.add(dim_param="batch")
            else:
                sizes.dim.add(dim_value=size)
    onnx.save(model, str(file))


def has_rows(value: Tensor, rows: int) -> bool:
    """Whether a tensor of a call with that many samples has one entry for each."""
    return value.ndim > 0 and value.shape[0] == rows


def _as_scheduled(timesteps: Sequence[float]) -> Tensor:
    """`(T,)`, of the type in which a scheduler would pass them."""
    exact = torch.tensor(timesteps, dtype=torch.float64)
    if all(time.is_integer() for time in timesteps):
        return exact.to(torch.int64)
    single = exact.float()
    return single if bool((single.double() == exact).all()) else exact
