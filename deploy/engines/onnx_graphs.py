"""The graphs of an artifact, written as ONNX: a full call, and the cached one that reads its feature.

First, layers of one of two forms take the places of the network's float ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.upsampling import KUpsample2D
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.engines.onnx_layers import (
    EngineAttention,
    EngineLayer,
    GatheredPart,
    PartMaker,
    StepTables,
    WeightOnlyEngineLayer,
    sizes_of,
)
from errata.deploy.engines.onnx_qdq import QDQAttention, QDQPart
from errata.deploy.engines.runtime import needed
from errata.deploy.manifest import Manifest
from errata.deploy.tensors import read_codes
from errata.runtime.attention import QuantizedAttention
from errata.runtime.feature_correction import correct_outputs
from errata.runtime.layers import Geometry, replace_module
from errata.runtime.output_map import OUTPUT_MAP
from errata.runtime.replacement import replace_layers
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

# The oldest that onnxruntime's int8 products need nothing newer than, so that old runtimes can read it.
OPSET = 17
FULL, CACHED = "full.onnx", "cached.onnx"
SAMPLE, STEP, FEATURE, PREDICTION = "sample", "step", "feature", "prediction"
# By form of an engine: the product of one part of an input, and the attention.
_FORMS: Mapping[str, tuple[PartMaker, type[EngineAttention | QDQAttention]]] = {
    "gathered": (GatheredPart, EngineAttention),
    "qdq": (QDQPart, QDQAttention),
}


def install_engine_layers(
    unet: nn.Module, scheme: Scheme, tensors: Mapping[str, Tensor], context: StepContext, *, form: str
) -> None:
    """Put the layers of an engine into `unet`, in place, for its float ones.

    Args:
        unet: the float network.
        scheme: of its layers.
        tensors: those of the artifact.
        context: tells the step.
        form: see `export_onnx`.
    """
    part, attention_class = _FORMS[form]

    def layer(described: LayerScheme, module: nn.Conv2d | nn.Linear) -> nn.Module:
        codes = read_codes(described, tensors, module.weight.shape)
        if described.activation_bits is None:
            return WeightOnlyEngineLayer(described, Geometry(module), codes, tensors)
        return EngineLayer(described, Geometry(module), codes, tensors, context, part=part)

    def attention(products: AttentionScheme) -> QuantizedAttention:
        query, key, value, probabilities = (StepTables(name, tensors, context) for name in products.sites)
        return attention_class(query=query, key=key, value=value, probabilities=probabilities)

    replace_layers(unet, scheme, layer=layer, attention=attention)
    correct_outputs(unet, scheme, tensors, context=context, device=torch.device("cpu"))
    for name, module in list(unet.named_modules()):
        if isinstance(module, KDownsample2D | KUpsample2D):
            replace_module(unet, name, EngineResampling(module))


class EngineResampling(nn.Module):
    """A K-block's change of resolution, channel by channel, as `KDownsample2D` and `KUpsample2D` compute it.

    They build a weight for all channels at each call, which a graph cannot hold.
    """

    def __init__(self, module: KDownsample2D | KUpsample2D) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", module.kernel, persistent=False)
        self.pad, self.pad_mode = module.pad, module.pad_mode
        self.is_up = isinstance(module, KUpsample2D)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, H, W)` at half or twice the height and width."""
        channels, height, width = sizes_of(x)[1:]
        border = (self.pad + 1) // 2 if self.is_up else self.pad
        padded = functional.pad(x, (border,) * 4, self.pad_mode)
        each = padded.reshape(-1, 1, height + 2 * border, width + 2 * border)
        if self.is_up:
            output = functional.conv_transpose2d(
                each, self.kernel[None, None], stride=2, padding=2 * self.pad + 1
            )
        else:
            output = functional.conv2d(each, self.kernel[None, None], stride=2)
        return output.reshape(-1, channels, *sizes_of(output)[2:])


class EngineOutputMap(nn.Module):
    """The calibrated output of an artifact, see `errata.runtime.output_map`, with gathered numbers."""

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.matrix: Tensor
        self.bias: Tensor
        self.register_buffer("matrix", matrix.contiguous())
        self.register_buffer("bias", bias[:, :, None].contiguous())

    @classmethod
    def of(cls, scheme: Scheme, tensors: Mapping[str, Tensor]) -> EngineOutputMap | None:
        """Return the map that a scheme asks for, with numbers of the artifact; None without one."""
        return None if scheme.output is None else cls(*(tensors[name] for name in OUTPUT_MAP))

    def forward(self, prediction: Tensor, step: Tensor) -> Tensor:
        """Return M ε̃ + b of that step, `(B, C, H, W)`."""
        flat = prediction.flatten(2)
        return (self.matrix[step] @ flat + self.bias[step]).reshape(-1, *sizes_of(prediction)[1:])


class _Graph(nn.Module):
    """What both graphs share: the network, its step context and output map, the timestep of each step."""

    def __init__(
        self,
        network: BranchedUNet,
        context: StepContext,
        manifest: Manifest,
        names: Sequence[str],
        output: EngineOutputMap | None,
    ) -> None:
        super().__init__()
        self.output = output
        self.network = network
        self.context = context
        self.branch = manifest.schedule.branch
        self.names = tuple(names)
        self.times: Tensor
        self.register_buffer("times", _as_scheduled(manifest.sampler.timesteps))

    def _mapped(self, prediction: Tensor, step: Tensor) -> Tensor:
        return prediction if self.output is None else self.output(prediction, step)

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
        prediction = self._mapped(prediction, step)
        return (prediction,) if feature is None else (prediction, feature)


class CachedGraph(_Graph):
    """Prediction from a feature that is corrected already."""

    def forward(self, sample: Tensor, step: Tensor, feature: Tensor, *cond: Tensor) -> Tensor:
        """See `Denoiser.cached`."""
        with self.context.at(step, kind="cached"):
            prediction = self.network.cached(
                sample, self.times[step], self._named(cond), feature, branch=self.branch
            )
        return self._mapped(prediction, step)


@torch.no_grad()
def write_graphs(
    network: BranchedUNet,
    context: StepContext,
    manifest: Manifest,
    sample: Tensor,
    cond: Mapping[str, Tensor],
    folder: Path,
    *,
    output: EngineOutputMap | None = None,
) -> None:
    """Write `full.onnx` and, with a cache, `cached.onnx` into `folder`.

    Args:
        network: with the layers of `install_engine_layers`, which read `context`.
        context: see there.
        manifest: of the artifact.
        sample: `(B, C, H, W)`, an input; the graphs take any number of samples of that size.
        cond: the other inputs of that call. Those whose first dimension is B have one entry for each sample.
        folder: an existing directory.
        output: the artifact's calibrated output, if it has one.
    """
    step = torch.tensor(0)
    full = FullGraph(network, context, manifest, tuple(cond), output).eval()
    outputs = full(sample, step, *cond.values())
    named = dict(zip((PREDICTION, FEATURE), outputs, strict=False))
    _write(full, {SAMPLE: sample, STEP: step, **cond}, named, folder / FULL)
    if FEATURE in named:
        cached = CachedGraph(network, context, manifest, tuple(cond), output).eval()
        inputs = {SAMPLE: sample, STEP: step, FEATURE: named[FEATURE], **cond}
        _write(cached, inputs, {PREDICTION: named[PREDICTION]}, folder / CACHED)


def _write(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], file: Path) -> None:
    rows = len(inputs[SAMPLE])
    with warnings.catch_warnings():
        # The exporter that traces is deprecated in torch 2.13, and warns of each size that it takes as fixed.
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
    """State the sizes of outputs: the exporter does not know them of nodes of another domain."""
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
    """Return whether a tensor of a call with that many samples has one entry for each."""
    return value.ndim > 0 and value.shape[0] == rows


def _as_scheduled(timesteps: Sequence[float]) -> Tensor:
    """Return `(T,)`, of the type in which a scheduler would pass them."""
    exact = torch.tensor(timesteps, dtype=torch.float64)
    if all(time.is_integer() for time in timesteps):
        return exact.to(torch.int64)
    single = exact.float()
    return single if bool((single.double() == exact).all()) else exact
