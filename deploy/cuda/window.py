"""The window of a convolution; a linear layer has a window of one pixel."""

from __future__ import annotations

from dataclasses import dataclass

from errata.runtime.layers import Geometry

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Kernel size, stride, padding and dilation, `(vertical, horizontal)`, in pixels."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @classmethod
    def of(cls, geometry: Geometry, kernel: Pair) -> Window:
        """Return the window of a layer whose weight has that kernel.

        Raises:
            ValueError: the padding is a word, such as "same", not a pair of numbers.
        """
        if not geometry.is_conv:
            return cls()
        if isinstance(geometry.padding, str):
            raise ValueError(
                f"padding={geometry.padding!r} is not supported; give the convolution padding in numbers"
            )
        stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
        return cls(kernel=kernel, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))

    @property
    def taps(self) -> int:
        """How many pixels it covers."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_pixel(self) -> bool:
        """Whether each output pixel reads the input pixel in its place only: a plain matrix product."""
        return self == Window()

    def output_size(self, height: int, width: int) -> Pair:
        """Return height and width of the output."""
        return self._steps(0, height), self._steps(1, width)

    def _steps(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
