"""How a layer is computed at a shape: always in the same way, or in the fastest.

**When it is chosen.** At the first call of a shape, not at load: how many rows a batch has, and so which
kernel is fastest, is known only then. Timing has no place in a CUDA graph, so a shape first seen there is an
error. Nor has it in torch.compile's tracing, where what is raised is swallowed and the layer left out of the
program: so tracing takes the int8 kernel that suits the shape, unmeasured, unless a plain call has chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from errata.deploy.cuda.candidates import candidates
from errata.deploy.cuda.chooser import Choice, Chooser
from errata.deploy.cuda.store import Key
from errata.deploy.cuda.tiles import TILES, tile_for
from errata.deploy.cuda.window import Window
from errata.errors import ArtifactError
from errata.runtime.scheme import LayerScheme


class SelectableLayer(Protocol):
    """What a selection has to know of a `CudaLayer`."""

    scheme: LayerScheme
    window: Window
    out_channels: int
    bias: Tensor | None

    def compute(self, name: str, parts: Sequence[Tensor], residual: Tensor | None) -> Tensor:
        """Return the layer in the way of that name; see `CudaLayer.compute`."""

    def drop_all_but(self, names: set[str]) -> None:
        """Free what the other ways need."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What the speed of a layer depends on, besides the layer.

    Attributes:
        input: shape of the input.
        rows: output pixels, or rows of a linear layer.
        dtype: of the input.
        has_residual: whether something is added to the output.
    """

    input: tuple[int, ...]
    rows: int
    dtype: torch.dtype
    has_residual: bool

    @classmethod
    def of(
        cls, layer: SelectableLayer, parts: Sequence[Tensor], x: Tensor, residual: Tensor | None
    ) -> LayerShape:
        """Return the shape of a call; `parts` are its input as pixels, `(B, H, W, C)`."""
        batch, height, width, _ = parts[0].shape
        out_height, out_width = layer.window.output_size(height, width)
        return cls(
            input=tuple(x.shape),
            rows=batch * out_height * out_width,
            dtype=x.dtype,
            has_residual=residual is not None,
        )

    def describe(self) -> str:
        """Return a short text, such as `2x320x64x64 float32`."""
        added = ", with residual" if self.has_residual else ""
        return f"{'x'.join(map(str, self.input))} {_name(self.dtype)}{added}"


class Selection(Protocol):
    """A rule that picks the way in which a layer is computed."""

    @property
    def prepared(self) -> tuple[str, ...]:
        """Ways that a layer makes ready when it is made, since nothing can be made while tracing."""

    def pick(
        self, layer: SelectableLayer, shape: LayerShape, parts: Sequence[Tensor], residual: Tensor | None
    ) -> str:
        """Name of the way; see `candidates`."""


class Fixed:
    """One way at every shape; None is Triton's int8 kernel with the tile that suits the shape."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self.prepared = tuple(TILES) if name is None else (name,)

    def pick(
        self, layer: SelectableLayer, shape: LayerShape, parts: Sequence[Tensor], residual: Tensor | None
    ) -> str:
        """See `Selection.pick`."""
        return tile_for(shape.rows, layer.out_channels) if self._name is None else self._name


class Measured:
    """The fastest way at each shape.

    Args:
        chooser: measures.
        has_triton: whether Triton's kernels are among the ways.
        machine: names of device and versions, which times depend on.

    Attributes:
        choices: what was chosen so far.
        on_choice: called after each choice.
    """

    def __init__(self, chooser: Chooser, *, has_triton: bool, machine: Key) -> None:
        self._chooser = chooser
        self._has_triton = has_triton
        self._machine = dict(machine)
        self.prepared = tuple(TILES) if has_triton else ()
        self.choices: dict[LayerShape, Choice] = {}
        self.on_choice: Callable[[], None] | None = None

    def pick(
        self, layer: SelectableLayer, shape: LayerShape, parts: Sequence[Tensor], residual: Tensor | None
    ) -> str:
        """See `Selection.pick`.

        Raises:
            ArtifactError: the shape is new, and a CUDA graph is being captured; or there is no triton, and
                torch.compile is tracing.
        """
        if shape in self.choices:
            return self.choices[shape].name
        if torch.compiler.is_compiling() and self._has_triton:
            return tile_for(shape.rows, layer.out_channels)
        if _is_recorded(parts[0]):
            raise ArtifactError(
                f"layer {layer.scheme.name!r} sees {shape.describe()} for the first time while a program is "
                "recorded, where kernels cannot be timed; call the network once at this shape before"
            )
        return self._measure(layer, shape, self._candidates(layer, shape), parts, residual)

    def _candidates(self, layer: SelectableLayer, shape: LayerShape) -> tuple[str, ...]:
        return candidates(
            rows=shape.rows,
            channels=layer.scheme.input_widths,
            out_channels=layer.out_channels,
            taps=layer.window.taps,
            dtype=shape.dtype,
            has_triton=self._has_triton,
        )

    def _measure(
        self,
        layer: SelectableLayer,
        shape: LayerShape,
        names: tuple[str, ...],
        parts: Sequence[Tensor],
        residual: Tensor | None,
    ) -> str:
        calls = {name: functools.partial(layer.compute, name, parts, residual) for name in names}
        choice = self._chooser.choose(self._key(layer, shape, parts), calls)
        self.choices[shape] = choice
        layer.drop_all_but({*self.prepared, *(made.name for made in self.choices.values())})
        if self.on_choice is not None:
            self.on_choice()
        return choice.name

    def _key(self, layer: SelectableLayer, shape: LayerShape, parts: Sequence[Tensor]) -> Key:
        window = {name: list(pair) for name, pair in asdict(layer.window).items()}
        return {
            **self._machine,
            "tiles": {name: list(asdict(tile).values()) for name, tile in TILES.items()},
            "input": list(shape.input),
            "is_channels_last": parts[0].stride(-1) == 1,
            "input_widths": list(layer.scheme.input_widths),
            "out_channels": layer.out_channels,
            "weight_bits": layer.scheme.weight_bits,
            "has_bias": layer.bias is not None,
            "window": window,
            "dtype": _name(shape.dtype),
            "has_residual": shape.has_residual,
        }


def _is_recorded(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
