"""How a report was measured: the part of its schema that says what it compares with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a report was measured: two reports compare only where this agrees.

    Attributes:
        samples: images per row.
        seed: image i starts from a generator seeded `seed + i`, in every row.
        steps: sampling steps.
        image_size: height, width and channels.
        feature_network: its name; the metric is "Fréchet distance in `feature_network`".
        feature_digest: SHA-256 of its weights.
        reference_count: number of real images; 0 if the statistics do not say.
        resamples: bootstrap resamples per interval.
        notes: what a reader must know before trusting the numbers.
        paired_with: whose images single images are compared with, "float" or "uncorrected".
        real_compared: real images whose features are kept for kernel distance, precision and recall.
        facts: what else belongs to the protocol of a metric, by its name.
        promised_seconds: denoiser calls of all rows at their measured costs.
        sampling_seconds: what sampling and measuring took, in the processes that did it.
    """

    samples: int
    seed: int
    batch_size: int
    steps: int
    image_size: tuple[int, int, int]
    feature_network: str
    feature_digest: str
    feature_dimension: int
    reference: str
    reference_count: int
    resamples: int
    machine: str
    device: str
    threads: int
    versions: Mapping[str, str]
    date: str
    command: str
    notes: tuple[str, ...] = ()
    paired_with: str = "float"
    facts: Mapping[str, str] = field(default_factory=dict)
    real_compared: int = 0
    promised_seconds: float | None = None
    sampling_seconds: float | None = None

    def finished(
        self,
        *,
        resamples: int,
        command: str | None,
        notes: tuple[str, ...],
        promised_seconds: float,
        sampling_seconds: float,
    ) -> Protocol:
        """The same with what is known at the end."""
        return replace(
            self,
            resamples=resamples,
            promised_seconds=promised_seconds,
            command=self.command if command is None else command,
            notes=self.notes + notes,
            sampling_seconds=sampling_seconds,
        )

    @property
    def metric(self) -> str:
        """Full name of the metric."""
        return f"Fréchet distance in {self.feature_network}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return asdict(self) | {"image_size": list(self.image_size), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Protocol:
        """Inverse of `to_json`."""
        known = {item.name: value[item.name] for item in fields(cls) if item.name in value}
        return cls(**known | {"image_size": tuple(known["image_size"]), "notes": tuple(known["notes"])})
