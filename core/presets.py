"""Named sets of smaller numbers, for machines with little memory and people with little time."""

from __future__ import annotations

from dataclasses import dataclass

from errata.errors import ErrataError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a preset sets where nothing else was asked for.

    Attributes:
        name: of the preset.
        least_samples: trajectories to record, at least.
        most_samples: trajectories to record, at most; between the two it is half the usual number.
        batch_part: the usual batch size is divided by this.
        range_samples: trajectories that activation ranges are chosen on.
        rounding: options of learned rounding, as in a recipe's name.
    """

    name: str
    least_samples: int
    most_samples: int
    batch_part: int
    range_samples: int
    rounding: tuple[tuple[str, int], ...]

    def samples(self, usual: int) -> int:
        """Return how many trajectories to record in place of the usual number."""
        return max(self.least_samples, min(self.most_samples, usual // 2))

    def batch_size(self, usual: int) -> int:
        """Return the batch size in place of the usual one."""
        return max(1, usual // self.batch_part)


# Held-out images take 4 trajectories at least, so 8 leave something to compare. Learned rounding keeps its
# number of iterations: with few of them it ends below rounding to nearest.
LAPTOP = Preset(
    name="laptop",
    least_samples=8,
    most_samples=64,
    batch_part=8,
    range_samples=16,
    rounding=(("samples", 128), ("batch_size", 8)),
)
PRESETS = {preset.name: preset for preset in (LAPTOP,)}


def find_preset(name: str | None, *, error: type[ErrataError]) -> Preset | None:
    """Return the preset of that name; None for None.

    Raises:
        ErrataError: of the given kind; there is no such preset.
    """
    if name is None:
        return None
    if name not in PRESETS:
        raise error(f"unknown preset {name!r}; allowed are: {', '.join(PRESETS)}, or none")
    return PRESETS[name]
