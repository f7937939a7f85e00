"""Choices of quantization: bits, rounding, and exceptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from errata.errors import RecipeError
from errata.runtime.weight_bits import allowed_weight_bits, is_weight_bits


@dataclass(frozen=True, kw_only=True)
class LearnedRounding:
    """Block-wise learned rounding of the weights, activation scales learned with it.

    Attributes:
        iterations: optimiser steps a block.
        learning_rate: of the rounding variables (Adam).
        scale_learning_rate: of the activation scales, relative to each scale.
        samples: recorded denoiser inputs, of mixed steps, that a block is reconstructed on.
        batch_size: of them per optimiser step.
        seed: of every random choice.

    Source: AdaRound (Nagel et al., 2020) and BRECQ (Li et al., 2021), as used by CacheQuant and EDA-DM.
    """

    iterations: int = 400
    learning_rate: float = 0.1
    scale_learning_rate: float = 1e-3
    samples: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "samples", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"rounding {name}={value!r}; allowed are whole numbers of at least 1")
        if type(self.seed) is not int or self.seed < 0:
            raise RecipeError(f"rounding seed={self.seed!r}; allowed are whole numbers of at least 0")
        for name, low in (("learning_rate", "above 0"), ("scale_learning_rate", "of at least 0")):
            value = getattr(self, name)
            is_number = type(value) in (int, float) and value == value and value < float("inf")
            if not is_number or value < 0 or (value == 0 and name == "learning_rate"):
                raise RecipeError(f"rounding {name}={value!r}; allowed are finite numbers {low}")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Bits of weights and activations, how weights are rounded, and exceptions.

    conv_in, conv_out and the layers of the time and other embeddings keep 8-bit weights.

    Attributes:
        weight_bits: of a registered weight format, see `errata.runtime.weight_formats`.
        activation_bits: 8.
        rounding: None rounds weights to nearest.
        bias_correction: biases take up the mean error that quantization leaves in a layer's output.
        equalization: weights of neighbouring layers are rescaled first; the float model stays what it is.
        bits: weight bits by name pattern; the first pattern that matches a layer decides.
        modules_to_not_convert: patterns of modules that stay in floating point.

    A pattern is the name of a layer or of a module that holds it, or has the wildcards `*`, `?` and `[…]`.
    """

    weight_bits: int
    activation_bits: int
    rounding: LearnedRounding | None = None
    bias_correction: bool = False
    equalization: bool = False
    bits: Mapping[str, int] = field(default_factory=dict, hash=False)
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_weight_bits(self.weight_bits):
            raise RecipeError(
                f"weight_bits={self.weight_bits!r} is not supported; allowed are {allowed_weight_bits()}"
            )
        if self.activation_bits != 8:
            raise RecipeError(f"activation_bits={self.activation_bits} is not supported; allowed is 8")
        for name in ("bias_correction", "equalization"):
            if type(getattr(self, name)) is not bool:
                raise RecipeError(f"{name}={getattr(self, name)!r}; allowed are true and false")
        for pattern, bits in self.bits.items():
            if type(pattern) is not str or not pattern or not is_weight_bits(bits):
                raise RecipeError(
                    f"bits: {pattern!r}: {bits!r}; allowed bits for a name pattern are "
                    f"{allowed_weight_bits()}"
                )
        if isinstance(self.modules_to_not_convert, str) or not all(
            isinstance(pattern, str) and pattern for pattern in self.modules_to_not_convert
        ):
            raise RecipeError(
                f"modules_to_not_convert={self.modules_to_not_convert!r}; allowed is a list of name patterns"
            )
        object.__setattr__(self, "bits", dict(self.bits))
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every name pattern that the recipe mentions."""
        return (*self.bits, *self.modules_to_not_convert)

    def exceptions(self) -> str:
        """Return what patterns say, as text; empty where there are none."""
        parts = [f"{bits}-bit weights in {pattern}" for pattern, bits in self.bits.items()]
        if self.modules_to_not_convert:
            parts.append(f"not quantized: {', '.join(self.modules_to_not_convert)}")
        return "; ".join(parts)

    def converts(self, name: str) -> bool:
        """Return whether the layer or attention of that name is quantized at all."""
        return not any(matches(pattern, name) for pattern in self.modules_to_not_convert)

    def bits_of(self, name: str, default: int) -> int:
        """Return the weight bits of the layer of that name; `default` where no pattern says otherwise."""
        return next((bits for pattern, bits in self.bits.items() if matches(pattern, name)), default)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "rounding": None if self.rounding is None else dict(vars(self.rounding)),
            "bias_correction": self.bias_correction,
            "equalization": self.equalization,
            "bits": dict(self.bits),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Quantization:
        """Read back what `to_json` wrote; a missing key has its default.

        Raises:
            RecipeError: an unknown key.
        """
        fields = known_fields(cls, value)
        if fields.get("rounding") is not None:
            fields["rounding"] = LearnedRounding(**known_fields(LearnedRounding, fields["rounding"]))
        return cls(**fields)


def known_fields(config: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping that is to become a dataclass, its keys checked.

    Raises:
        RecipeError: a key is not one of its fields.
    """
    names = [field.name for field in dataclasses.fields(config)]
    if unknown := [key for key in value if key not in names]:
        raise RecipeError(
            f"unknown key {unknown[0]!r} in the recipe; {config.__name__} takes {', '.join(names)}"
        )
    return dict(value)


def matches(pattern: str, name: str) -> bool:
    """Return whether the pattern means the module of that name, or one that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))
