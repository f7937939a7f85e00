"""Bias correction: biases take up the mean error that quantization leaves in a layer's output."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import BlockListener, BlockReport
from errata.compress.quantize.partial_forward import input_of
from errata.compress.quantize.recorded_inputs import MixedRows, mixed_rows
from errata.compress.quantize.simulation import simulate
from errata.errors import RecipeError
from errata.journal import Stage
from errata.large_weights import sharing_copy
from errata.runtime.scheme import LayerScheme, Scheme
from errata.runtime.step_context import StepContext

# Enough for a mean: its noise is at most 1/128 of the mean square of the error, the bias about a tenth of it.
SAMPLES = 128
_BATCH_SIZE = 64

Tensors = dict[str, Tensor]


def correct_biases(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    table: Mapping[str, Tensor],
    *,
    stage: Stage,
    report: BlockListener | None = None,
) -> Tensors:
    """Return biases of quantized layers such that each output channel has the mean of the float network's.

    Layers are corrected in the order in which they run, `b' = b + E[y] - E[y_q]`, where `y_q` comes from the
    quantized network with everything before already corrected, and the mean is over recorded inputs of mixed
    steps and over positions. A correction changes what later layers read, so correcting all from one pass
    would count a shift again in every layer that it reaches. Only layers that read the very same values (the
    query, key and value of an attention; all projections of the time embedding) share a pass. A pass ends at
    the layer it is for.

    What it removes is small in one prediction but adds up over a run: on the embedded model at w4a8 the error
    of a prediction went from 7.2 to 7.1 %, the mean shift of 25-step images from -0.070 to -0.014.

    One bias serves all steps, so a shift that changes sign from step to step is not removed. Cached steps are
    not looked at: means are those of full passes. Memory: two networks and `SAMPLES` recorded inputs.

    Args:
        unet: the float network that the table belongs to, equalized if that was equalized.
        calibration_set: its trajectories.
        scheme: what is quantized.
        table: codes, scales and zero points, however rounded; biases in it are the start.
        stage: `stage(name, make)` returns `make()`, or what it returned when a stage of that name was last
            finished.
        report: told of every corrected group of layers; its losses are mean squared errors of their outputs.

    Returns:
        `<layer>.bias`, float32, `(O,)`, on the CPU, of every quantized layer with a bias.

    Raises:
        RecipeError: a layer of the scheme never runs.

    Source: empirical bias correction of Nagel et al., 2019 (Data-Free Quantization, section 4.2 and
        appendix D). Deviation: inputs are those of the quantized prefix, not of the float network.
    """
    layers = {layer.name: layer for layer in scheme.layers if _has_bias(unet, layer.name)}
    if not layers:
        return {}
    rows = mixed_rows(calibration_set, samples=SAMPLES, batch_size=_BATCH_SIZE)
    pair = _Pair.of(unet, scheme, table)
    groups = groups_of(pair.original, tuple(layers), rows[0])
    biases: Tensors = {}
    bar = tqdm(groups, desc="bias correction", unit="pass", disable=None)  # None: not without a terminal
    for index, group in enumerate(bar):
        correction = _Correction(pair, [layers[name] for name in group], rows)
        result = stage(f"bias.{group[0]}", correction)
        corrected = {f"{name}.bias": result[f"{name}.bias"] for name in group}
        pair.set_biases(corrected)
        biases |= corrected
        if report is not None:
            report(_report(group[0], index, len(groups), result, is_resumed=not correction.was_made))
    return biases


@torch.no_grad()
def groups_of(unet: nn.Module, names: Sequence[str], rows: MixedRows) -> tuple[tuple[str, ...], ...]:
    """Return the named layers in the order in which they run, those that read the same values together.

    Raises:
        RecipeError: a layer did not run.
    """
    inputs: dict[str, str] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, _digest(name, arguments[0]))

        return note

    handles = [unet.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        rows.predict(unet)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [name for name in names if name not in inputs]:
        raise RecipeError(
            f"layer {idle[0]!r} never runs, so its bias cannot be corrected; "
            "name it in modules_to_not_convert, or turn bias correction off"
        )
    groups: dict[str, list[str]] = {}
    for name, digest in inputs.items():
        groups.setdefault(digest, []).append(name)
    return tuple(tuple(group) for group in groups.values())


@dataclass(frozen=True)
class _Pair:
    """The float network, and its simulation with the biases corrected so far."""

    original: nn.Module
    simulated: nn.Module
    context: StepContext

    @classmethod
    def of(cls, unet: nn.Module, scheme: Scheme, table: Mapping[str, Tensor]) -> _Pair:
        context = StepContext()
        return cls(sharing_copy(unet, torch.float32), simulate(unet, scheme, table, context), context)

    @torch.no_grad()
    def set_biases(self, biases: Mapping[str, Tensor]) -> None:
        for name, bias in biases.items():
            self.simulated.get_parameter(name).copy_(bias)

    @torch.no_grad()
    def outputs(self, names: Sequence[str], rows: MixedRows) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float and simulated output of each of the layers, which read the same input."""
        original = _input_of(self.original, names[0], rows)
        with self.context.at(rows.steps):
            simulated = _input_of(self.simulated, names[0], rows)
            for name in names:
                yield (
                    self.original.get_submodule(name)(original),
                    self.simulated.get_submodule(name)(simulated),
                )


class _Correction:
    """A group's correction: measures and corrects it when called, and remembers that it was called."""

    def __init__(self, pair: _Pair, layers: Sequence[LayerScheme], rows: Sequence[MixedRows]) -> None:
        self._pair, self._layers, self._rows = pair, layers, rows
        self.was_made = False

    def __call__(self) -> Tensors:
        start = time.perf_counter()
        self.was_made = True
        means = [_MeanError(channel_dim=1 if layer.kind == "conv2d" else -1) for layer in self._layers]
        device = next(self._pair.original.parameters()).device
        names = [layer.name for layer in self._layers]
        for rows in self._rows:
            pairs = self._pair.outputs(names, rows.to(device))
            for mean, (original, simulated) in zip(means, pairs, strict=True):
                mean.add(original - simulated)
        result: Tensors = {}
        for name, mean in zip(names, means, strict=True):
            bias = self._pair.simulated.get_parameter(f"{name}.bias").detach()
            result[f"{name}.bias"] = (bias.double() + mean.value()).float().cpu()
        before = torch.stack([mean.square() for mean in means]).mean()
        gain = torch.stack([mean.value().square().mean() for mean in means]).mean()
        losses = torch.stack([before, before - gain]).clamp(min=0).cpu()
        return {**result, "losses": losses, "seconds": torch.tensor(time.perf_counter() - start)}


class _MeanError:
    """Running mean of a stream of tensors per channel, and of their squares, in float64."""

    def __init__(self, *, channel_dim: int) -> None:
        self._dim = channel_dim
        self._count = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, x: Tensor) -> None:
        flat = x.movedim(self._dim, 0).flatten(1)
        total = flat.sum(dim=1, dtype=torch.float64)
        squares = flat.double().square().sum()
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += flat.shape[1]

    def value(self) -> Tensor:
        """Return the mean `(O,)`."""
        assert self._sum is not None  # there is at least one batch
        return self._sum / self._count

    def square(self) -> Tensor:
        """Return the mean square over all channels, a scalar."""
        assert self._squares is not None
        assert self._sum is not None
        return self._squares / (self._count * len(self._sum))


def _input_of(unet: nn.Module, name: str, rows: MixedRows) -> Tensor:
    """Return what the layer of that name reads; nothing after it is computed."""
    (x, *_), _ = input_of(unet.get_submodule(name), partial(rows.predict, unet))
    assert isinstance(x, Tensor)  # convolutions and linear layers take one
    return x


def _digest(name: str, x: Tensor) -> str:
    """Return a text that is equal for layers that read the same values; for zeros, the layer's own name."""
    if not bool(x.any()):
        return name
    shape = ",".join(str(size) for size in x.shape)
    return hashlib.sha256(shape.encode() + x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _has_bias(unet: nn.Module, name: str) -> bool:
    return getattr(unet.get_submodule(name), "bias", None) is not None


def _report(name: str, index: int, total: int, result: Tensors, *, is_resumed: bool) -> BlockReport:
    before, after = result["losses"].tolist()
    seconds = float(result["seconds"])
    return BlockReport(
        name=name, index=index, total=total, loss_before=before, loss_after=after, seconds=seconds,
        is_resumed=is_resumed,
    )  # fmt: skip
