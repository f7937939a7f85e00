"""The correction of a cache (DEC), fitted on recorded trajectories.

    symbol   here      meaning
    x_i      record    the network's input that the float pipeline recorded at step i
    F_i      wanted    feature of the float model in a full pass at x_i
    F_s      stored    feature that the compressed model leaves in the cache at the full step s before i, of
                       the same stream where a sampler step has several calls
    a, b     gain,     fitted over samples and positions, one pair for each step and channel
             shift

Cache part: `F_i ≈ a ⊙ F_s + b`, by the recipe's choice of gain (see `ChannelFit`).

Quantization part, for each layer that reads the feature: `Y_i ≈ a ⊙ (W x + bias) + b`, by least squares.
`W x + bias` is the layer's output in the compressed model's cached pass at x_i, from the corrected feature,
and Y_i its output in the float model's cached pass at x_i from the very same feature. So the two parts are
decoupled: this one sees errors of quantization only.

Both models are evaluated at the recorded states, those of the float pipeline; the compressed pipeline's own
would depend on the correction that is being fitted.

Source: CacheQuant (Liu et al., CVPR 2025), section 3.3. Deviation: the gain of the cache part is the ratio of
standard deviations unless the recipe asks for least squares. On the embedded model (w8a8, N = 15, 100 steps,
256 images) it gave 28.5 dB to the float model's images against 28.3 dB; taking the float model's *full* pass
as Y_i gave less than no quantization part at all (N = 10: 29.7 dB, without it 29.9 dB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress.cache.cache_features import (
    SAMPLES,
    FloatModel,
    RefinedInputs,
    chunk_size,
    chunks,
    progress,
)
from errata.compress.quantize.recorded_inputs import inputs_on
from errata.compress.quantize.simulation import simulate
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.feature_correction import FEATURE, OUTPUT, FeatureCorrection
from errata.runtime.recipes.caching import CacheQuant
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import CorrectedLayer, Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

# Features and layer outputs of one chunk, in float32 and float64, that are held at the same time.
_KEPT_FEATURES = 12

Gain = Literal["spread", "least_squares"]

# Below this share of its mean square, what varies in a channel is rounding error of its sums.
_CONSTANT = 1e-12
# Features of neighbouring steps differ less (embedded model, N = 15: gains of 0.5 to 2.3). A channel that
# hardly varies in the cache says little about one that does, and must not be blown up.
_LARGEST_SPREAD = 4.0


@torch.no_grad()
def fit_cache_correction(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    table: Mapping[str, Tensor],
    schedule: CacheSchedule,
    cache: CacheQuant,
    *,
    samples: int = SAMPLES,
) -> dict[str, Tensor]:
    """Return the numbers of `scheme.correction`: `cache.gain`, `cache.shift`, `<layer>.output_gain`, …

    Each is `(T, channels)`, float32, with gain 1 and shift 0 at full steps. Memory is that of one chunk of
    samples, for any number of samples and steps.

    Args:
        unet: the float network that `table` quantizes; left alone.
        calibration_set: its trajectories.
        scheme: what is quantized and corrected; empty but for the correction without quantization.
        table: codes, scales and zero points of the scheme.
        schedule: which steps are full.
        cache: `corrected_by="iec"` takes F_s from the full pass that Iterative Error Correction makes last
            and leaves in the cache, see `RefinedInputs`; otherwise it is that of the plain pass at x_s.
        samples: how many trajectories to use, at most.

    Raises:
        RecipeError: IEC's inputs cannot be derived from the recorded ones.
    """
    if scheme.correction is None:
        return {}
    fitting = _Fitting(unet, calibration_set, scheme, table, schedule, cache, samples=samples)
    found = fitting.feature_part(scheme.correction.feature_channels)
    return found | fitting.output_part(scheme.correction.layers, FeatureCorrection.of(scheme, found))


class _Fitting:
    """The float and the compressed model side by side, at the cached steps of recorded trajectories."""

    def __init__(
        self,
        unet: nn.Module,
        calibration_set: CalibrationSet,
        scheme: Scheme,
        table: Mapping[str, Tensor],
        schedule: CacheSchedule,
        cache: CacheQuant,
        *,
        samples: int,
    ) -> None:
        self._set = calibration_set
        self._schedule = schedule
        self._samples = samples
        self._float = FloatModel(unet, calibration_set, branch=schedule.branch)
        self._context = StepContext()
        self._simulated = simulate(self._float.unet, scheme, table, self._context)
        self._gain_of = cache.gain
        is_refined = cache.corrected_by == "iec" and len(schedule.full_steps) < schedule.num_steps
        refined = RefinedInputs(unet, calibration_set) if is_refined else None
        self._full_input: Callable[[Record, Record], Record] = refined.at if refined else _recorded

    def feature_part(self, channels: int) -> dict[str, Tensor]:
        """Return `cache.gain` and `cache.shift`."""
        fit = ChannelFit(self._schedule.num_steps, channels)
        for record, stored in self._cached_calls(self._denoiser(None), "cache correction"):
            fit.add(record.step, stored, self._float.feature(record))
        return dict(zip(FEATURE, fit.solve(self._gain_of), strict=True))

    def output_part(
        self, layers: tuple[CorrectedLayer, ...], correction: FeatureCorrection | None
    ) -> dict[str, Tensor]:
        """Return the pairs of the layers that read the feature, given that it is corrected."""
        if not layers or correction is None:
            return {}
        names = [layer.name for layer in layers]
        fits = [ChannelFit(self._schedule.num_steps, layer.channels) for layer in layers]
        denoiser = self._denoiser(correction)
        with _outputs(self._float.unet, names) as wanted, _outputs(self._simulated, names) as found:
            for record, stored in self._cached_calls(denoiser, "output correction"):
                x, cond = inputs_on(self._simulated, record)
                self._float.cached(record, correction(stored, record.step))
                denoiser.cached(x, record.step, cond, stored)
                for name, fit in zip(names, fits, strict=True):
                    channel_dim = 1 if found[name].ndim == 4 else -1  # a convolution's, or a linear layer's
                    fit.add(record.step, found[name], wanted[name], channel_dim=channel_dim)
        table: dict[str, Tensor] = {}
        for name, fit in zip(names, fits, strict=True):
            table |= {
                pattern.format(layer=name): value for pattern, value in zip(OUTPUT, fit.solve(), strict=True)
            }
        return table

    def _denoiser(self, correction: FeatureCorrection | None) -> UNetDenoiser:
        return UNetDenoiser(
            BranchedUNet(self._simulated),
            self._context,
            self._schedule,
            tuple(float(time) for time in self._set.timesteps),
            correction=correction,
        )

    def _cached_calls(self, denoiser: UNetDenoiser, title: str) -> Iterator[tuple[Record, Tensor]]:
        """Yield every cached step's record of every chunk, with the feature that it reads."""
        others = self._schedule.calls_per_step - 1
        size = chunk_size(self._float, self._set, kept_features=_KEPT_FEATURES + others)
        with progress(self._set, samples=self._samples, title=title) as bar:
            for chunk in chunks(self._set, samples=self._samples, batch_size=size):
                full: dict[int, Record] = {}  # by stream, as `stored`
                stored: dict[int, Tensor] = {}
                for record in chunk:
                    stream = self._schedule.stream(record.step)
                    if self._schedule.kind(record.step) == "full":
                        full[stream] = record
                        stored.pop(stream, None)
                    else:
                        if stream not in stored:
                            stored[stream] = self._stored(denoiser, self._full_input(full[stream], record))
                        yield record, stored[stream]
                    bar.update(len(record.sample) // self._set.rows_per_sample)

    def _stored(self, denoiser: UNetDenoiser, record: Record) -> Tensor:
        x, cond = inputs_on(self._simulated, record)
        _, feature = denoiser.full(x, record.step, cond)
        assert feature is not None  # the schedule has a cache
        return feature


def _recorded(full: Record, following: Record) -> Record:
    """Return the full call's own record: the plain pass is made at the recorded input itself."""
    return full


@contextmanager
def _outputs(unet: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that holds the latest output of each of these layers."""
    latest: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            latest[name] = output

        return keep

    handles = [unet.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


class ChannelFit:
    """`target ≈ gain · source + shift` for every step and channel; keeps sums only.

        shift = mean(target) - gain · mean(source)
        gain = cov(source, target) / var(source)        "least_squares"
        gain = std(target) / std(source)                "spread"

    A least squares line shrinks what it cannot predict towards the mean; the second gain leaves the corrected
    source the mean and the standard deviation of the target, up to four times its own. They agree where the
    target is affine in the source with a gain between 0 and 4.

    A channel whose source does not vary gets gain 1 and the difference of the means; a step without pairs is
    left as it is, gain 1 and shift 0.
    """

    def __init__(self, num_steps: int, channels: int) -> None:
        # Per step and channel: count, and the sums of x, y, x², xy, y².
        self._sums = torch.zeros(6, num_steps, channels, dtype=torch.float64)

    def add(self, step: int, source: Tensor, target: Tensor, *, channel_dim: int = 1) -> None:
        """Add tensors of one shape that were seen at a step; all dimensions but the channels are positions.

        Sums are taken in float64.
        """
        x, y = (value.movedim(channel_dim, 0).flatten(1).double() for value in (source, target))
        count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64, device=x.device)
        sums = torch.stack([count, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)])
        self._sums[:, step] += sums.cpu()

    def solve(self, gain_of: Gain = "least_squares") -> tuple[Tensor, Tensor]:
        """Return `(gain, shift)`, each `(T, C)`, float32."""
        count = self._sums[0].clamp(min=1)
        x, y, xx, xy, yy = self._sums[1:] / count
        variance, covariance, wanted = xx - x * x, xy - x * y, (yy - y * y).clamp(min=0)
        is_constant = variance <= _CONSTANT * xx
        spread = (wanted / variance).sqrt().clamp(max=_LARGEST_SPREAD)
        found = covariance / variance if gain_of == "least_squares" else spread
        gain = torch.where(is_constant, 1.0, found)
        return gain.float(), (y - gain * x).float()
