"""Published and measured columns side by side, as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_rows import Row

from errata.report import Estimate, Overhead

SCHEMA = "errata-paper-table/1"
HEADINGS = {"fid": "FID", "is": "IS", "clip": "CLIP", "overhead": "overhead"}
# Settings that the command line may change.
CHANGEABLE = ("pipeline", "steps", "samples", "batch_size", "calibration", "reference", "feature_network")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the paper with what was measured.

    Attributes:
        row: as it was run.
        paper: as its file says.
        frechet: None where the row was left out.
        network: feature network of `frechet`.
        overhead: None without correction.
        protocol: how it was measured, for machines.
    """

    row: Row
    paper: Row
    frechet: Estimate | None
    network: str
    overhead: Overhead | None = None
    protocol: Mapping[str, Any] | None = None

    @property
    def measured(self) -> dict[str, str | None]:
        """Measured texts by published metric; None where the report does not measure it."""
        texts: dict[str, str | None] = dict.fromkeys(self.row.published)
        if self.frechet is not None:
            texts["fid"] = f"{self.frechet.value:.2f}"
        if self.overhead is not None:
            texts["overhead"] = f"{self.overhead.defined:.1%}"
        return texts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        overhead = self.overhead
        return {
            "table": self.row.table,
            "row": self.row.row,
            "dataset": self.row.dataset,
            "recipe": self.row.recipe,
            "plan": self.row.plan,
            "published": dict(self.row.published),
            "measured": {
                "frechet": None if self.frechet is None else self.frechet.to_json(),
                "feature_network": self.network,
                "overhead": None if overhead is None else overhead.defined,
                "overhead_by_the_clock": None if overhead is None else overhead.measured,
            },
            "unsupported": dict(self.row.unsupported),
            "ambiguous": self.row.ambiguous,
            "differences": list(differences(self)),
            "settings": self.row.to_json(),
            "protocol": self.protocol,
        }


def differences(line: Line) -> tuple[str, ...]:
    """How the measurement differs from the paper's, as far as it is known."""
    run, paper = line.row, line.paper
    changed = tuple(
        f"{name} is {_told(getattr(run, name))} instead of {_told(getattr(paper, name))}."
        for name in CHANGEABLE
        if getattr(run, name) != getattr(paper, name)
    )
    if run.feature_network == "inception":
        network = "FID is measured in torch-fidelity's port of Inception, on images as they are drawn."
    else:
        network = (
            f'"FID" is a Fréchet distance in {line.network}, no Inception network: it compares with other '
            "rows measured so, not with published ones."
        )
    clock = (
        "Overhead is that of the extra denoiser calls at their measured cost, on this machine; the paper "
        "timed an NVIDIA 3090."
    )
    left_out = tuple(f"{name}: {reason}" for name, reason in run.unsupported.items())
    return (*changed, network, *((clock,) if line.overhead else ()), *left_out, *run.differences)


def write(lines: Sequence[Line], out: Path, *, command: str) -> str:
    """Writes `out`.json and `out`.md, and returns the Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    value = {"schema": SCHEMA, "command": command, "rows": [line.to_json() for line in lines]}
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    out.with_name(f"{out.name}.json").write_text(text + "\n", encoding="utf-8")
    page = markdown(lines, command=command)
    out.with_name(f"{out.name}.md").write_text(page, encoding="utf-8")
    return page


def markdown(lines: Sequence[Line], *, command: str) -> str:
    """The table, then protocol and differences of each dataset."""
    metrics = [
        name
        for name in HEADINGS
        if any(name in line.row.published or line.measured.get(name) for line in lines)
    ]
    header = ["table", "dataset", "row", "recipe", "plan"]
    for metric in metrics:
        header += [f"{HEADINGS[metric]} published", f"{HEADINGS[metric]} measured"]
    table = [header, ["---"] * len(header), *(_cells(line, metrics) for line in lines)]
    remarks = [f"- {', '.join(names)}: {text}" for text, names in _remarks(lines).items()]
    return (
        "\n\n".join(["\n".join(map(_joined, table)), "\n".join([*remarks, f"- Command: `{command}`"])]) + "\n"
    )


def _joined(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(line: Line, metrics: Sequence[str]) -> list[str]:
    row = line.row
    cells = [str(row.table), row.dataset, row.row, row.recipe or "float", row.plan_name]
    for metric in metrics:
        measured = line.measured.get(metric)
        if metric == "fid" and line.frechet is not None:
            low, high = line.frechet.interval.low, line.frechet.interval.high
            measured = f"{measured} ({low:.2f} to {high:.2f})"
        cells += [row.published.get(metric) or "–", measured or "–"]
    return cells


def _remarks(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Differences and ambiguities, each once, with where it holds."""
    found: dict[str, list[str]] = {}
    for line in lines:
        texts = [*differences(line), *([line.row.ambiguous.strip()] if line.row.ambiguous else [])]
        for text in texts:
            places = found.setdefault(text, [])
            if line.row.dataset not in places:
                places.append(line.row.dataset)
    return found


def _told(value: Any) -> str:
    return str(dict(value) if isinstance(value, Mapping) else value)
