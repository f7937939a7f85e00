"""What a caller gives a pipeline: a prompt for each sample, and a mapping of inputs for each sample-batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

from errata.errors import CalibrationError
from errata.fingerprint import value_digest

__all__ = ["Given", "Inputs", "check_inputs", "given_batches", "take_prompts"]

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """The inputs of one sample-batch, and their digest; None if there are none."""

    inputs: Inputs | None = None
    digest: str | None = None


def take_prompts(prompts: Iterable[str], num_samples: int) -> list[str]:
    """Return one prompt for each sample.

    Raises:
        CalibrationError: there are too few, or something is no text.
    """
    if isinstance(prompts, str):
        raise CalibrationError("`prompts` is one text; pass a list with one text per sample")
    texts = list(islice(prompts, num_samples))
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"`prompts` has {text!r}; expected texts")
    if len(texts) < num_samples:
        raise CalibrationError(_too_few("prompts", len(texts), num_samples, "one text per sample"))
    return texts


def check_inputs(inputs: Iterable[Inputs], num_batches: int) -> Iterable[Inputs]:
    """Find out early what can be known without drawing from the iterable.

    Raises:
        CalibrationError: it is a mapping, or known to be too short.
    """
    if isinstance(inputs, Mapping):
        raise CalibrationError("`inputs` is one mapping; pass a list of mappings, one per sample-batch")
    if isinstance(inputs, Sized) and len(inputs) < num_batches:
        raise CalibrationError(_too_few("inputs", len(inputs), num_batches, "one mapping per sample-batch"))
    return inputs


def given_batches(
    inputs: Iterable[Inputs] | None, num_batches: int, mine: Collection[int]
) -> Iterator[tuple[int, Given]]:
    """Yield number and inputs of each sample-batch in `mine`; draw no more mappings than there are batches.

    Raises:
        CalibrationError: there are too few mappings, or something is no mapping.
    """
    if inputs is None:
        yield from ((index, Given()) for index in mine)
        return
    count = 0
    for count, mapping in enumerate(islice(inputs, num_batches), start=1):
        if not isinstance(mapping, Mapping):
            raise CalibrationError(f"`inputs` yields {mapping!r}; expected mappings of pipeline arguments")
        if count - 1 in mine:
            yield count - 1, Given(mapping, value_digest(mapping, name="inputs"))
    if count < num_batches:
        raise CalibrationError(_too_few("inputs", count, num_batches, "one mapping per sample-batch"))


def _too_few(name: str, count: int, needed: int, rule: str) -> str:
    return f"`{name}` has {count} entries, {needed} are needed ({rule}); give more, or lower num_samples"
