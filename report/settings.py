"""What must be the same for one run to go on with another's measurements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import canonical_json
from errata.correct.sampling import Inputs
from errata.directories import check_is_vacant, refusals_as
from errata.errors import ReportError
from errata.quality.frechet import FeatureStatistics
from errata.report.measurements import write_whole

SCHEMA = "errata-measurements/1"
FOLDER = "measurements"
FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Beside what names a row's own measurements (`errata.report.grid`).

    Attributes:
        seed: of image 0.
        batch_size: images of a batch; they are made together, so their last bits depend on it.
        network: digest of the feature network's weights.
        reference: digest of the reference's mean and covariance.
        paired_with: what images are compared with one by one: a float model's fingerprint, or "uncorrected".
        scores: what is measured of single images.
        shown: how many of the first images are kept.
    """

    seed: int
    batch_size: int
    network: str
    reference: str
    paired_with: str
    scores: tuple[str, ...]
    shown: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return {"schema": SCHEMA, **asdict(self), "scores": list(self.scores)}


def open_folder(out: Path, settings: Settings) -> Path:
    """The folder of measurements in `out`, made unless it is there with the same settings.

    Raises:
        ReportError: `out` holds something else, or measurements with other settings.
    """
    folder = out / FOLDER
    file = folder / FILE
    if file.is_file():
        check_same(read_settings(folder), settings.to_json(), folder)
        return folder
    check_is_vacant(out, error=ReportError)
    if not out.parent.is_dir():
        raise ReportError(f"cannot make `{out}`: `{out.parent}` is no directory; create it first")
    with refusals_as(ReportError, doing=f"make `{out}`", advice="choose another directory"):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, canonical_json.dumps(settings.to_json()))
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder of measurements.

    Raises:
        ReportError: it is none, or of another version.
    """
    file = folder / FILE
    try:
        value = canonical_json.loads_strict(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise ReportError(
            f"`{folder}` holds no measurements of `errata report` ({problem}); give the --out of such a run"
        ) from problem
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ReportError(f"`{file}` has schema {schema!r}; this release reads {SCHEMA!r}")
    return dict(value)


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix measurements.

    Raises:
        ReportError: naming the first difference.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ReportError(
                f"`{folder}` was measured with {name} {_short(found.get(name))}, now it is {_short(value)}; "
                "give the same options to go on there, or choose another directory"
            )


def batch_names(inputs: Inputs, batches: Sequence[range]) -> tuple[str, ...]:
    """A name for each batch that tells its number, and what its pipelines are called with beside the noise.

    Raises:
        ReportError: an argument is of a kind whose content cannot be read.
    """
    names = []
    for number, batch in enumerate(batches):
        digest = hashlib.sha256(f"{len(batch)}\n".encode())
        for name, value in sorted(inputs(batch).items()):
            digest.update(f"{name}\n".encode())
            _add(digest, name, value)
        names.append(f"{number:06d}-{digest.hexdigest()[:16]}")
    return tuple(names)


def statistics_digest(statistics: FeatureStatistics) -> str:
    """SHA-256 of a mean and a covariance."""
    digest = hashlib.sha256()
    for tensor in (statistics.mean, statistics.covariance):
        _add(digest, "statistics", tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # a picture, or an array of numpy's
        digest.update(value.tobytes())
    elif isinstance(value, list | tuple) and not _is_plain(value):
        for item in value:
            _add(digest, name, item)
    elif _is_plain(value):
        digest.update(json.dumps(value).encode() + b"\n")
    else:
        raise ReportError(
            f"the pipelines' argument {name!r} is a {type(value).__name__}, whose content nobody can compare "
            "with that of an earlier run; pass text, numbers, pictures or tensors"
        )


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) > 24 else repr(value)
