"""Published and measured columns side by side, as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper_rows import Row

from errata.report import Estimate, Overhead

SCHEMA = "errata-paper-table/1"
# Settings that the command line may change.
CHANGEABLE = ("pipeline", "steps", "samples", "batch_size", "calibration", "reference", "clip")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the paper with what was measured.

    Attributes:
        row: as it was run.
        paper: as its file says.
        frechet: None where the row was left out.
        metrics: what else was measured, named as in a report.
        network: feature network of `frechet`, and of the Inception Score.
        overhead: None without correction.
        protocol: how it was measured, for machines.
    """

    row: Row
    paper: Row
    frechet: Estimate | None = None
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    network: str = ""
    overhead: Overhead | None = None
    protocol: Mapping[str, Any] | None = None

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
                "metrics": {name: value.to_json() for name, value in self.metrics.items()},
                "feature_network": self.network,
                "overhead": None if overhead is None else overhead.defined,
                "overhead_by_the_clock": None if overhead is None else overhead.measured,
                "overhead_by_the_clock_quartiles": None if overhead is None else list(overhead.spread),
            },
            "unsupported": dict(self.row.unsupported),
            "ambiguous": self.row.ambiguous,
            "differences": list(differences(self)),
            "settings": self.row.to_json(),
            "protocol": self.protocol,
        }


Cell = Callable[[Line], str | None]
"""Text of a line in one column; None where there is nothing."""


def differences(line: Line) -> tuple[str, ...]:
    """How the measurement differs from the paper's, as far as it is known."""
    run, paper = line.row, line.paper
    changed = tuple(
        f"{name} is {_told(getattr(run, name))} instead of {_told(getattr(paper, name))}."
        for name in CHANGEABLE
        if getattr(run, name) != getattr(paper, name)
    )
    left_out = tuple(f"{name}: {reason}" for name, reason in run.unsupported.items())
    return (*changed, *_of_metrics(line), *left_out, *run.differences)


def _of_metrics(line: Line) -> list[str]:
    """How the figures are taken, where the paper takes them otherwise or does not say."""
    if line.frechet is None:
        return []
    told = []
    is_inception = line.row.feature_network.partition(":")[0] == "inception"
    if is_inception:
        told.append("FID is measured in torch-fidelity's port of Inception, on images as they are drawn.")
    else:
        told.append(
            f'"FID" is a Fréchet distance in {line.network}, no Inception network: it compares with other '
            "rows measured so, not with published ones."
        )
    if "is" in line.row.published:
        classes = "" if is_inception else f" It is that of the classes of {line.network}, not of Inception."
        told.append(
            "IS is over all images in one split; published ones are usually means over 10 splits, which come "
            f"out lower.{classes}"
        )
    if "clip" in line.row.published and line.row.clip is not None:
        told.append(f"CLIP is 100 times the cosine, at least 0, of image and caption in {line.row.clip}.")
    if line.overhead:
        told.append(
            "Overhead is computed (extra denoiser calls at their measured cost) and measured (wall clock, "
            "median over batches), both on this machine; the paper timed an NVIDIA 3090."
        )
    return told


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
    columns = {
        heading: cell
        for metric, found in COLUMNS.items()
        if any(metric in line.row.published or (metric == "overhead" and line.overhead) for line in lines)
        for heading, cell in found.items()
    }
    header = ["table", "dataset", "row", "recipe", "plan", *columns]
    table = [header, ["---"] * len(header)]
    for line in lines:
        row = line.row
        first = [str(row.table), row.dataset, row.row, row.recipe or "float", row.plan_name]
        table.append([*first, *(cell(line) or "–" for cell in columns.values())])
    remarks = [f"- {', '.join(names)}: {text}" for text, names in _remarks(lines).items()]
    return (
        "\n\n".join(["\n".join(map(_joined, table)), "\n".join([*remarks, f"- Command: `{command}`"])]) + "\n"
    )


def _joined(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


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


def _published(metric: str) -> Cell:
    return lambda line: line.row.published.get(metric)


def _estimated(value: Estimate | None) -> str | None:
    if value is None:
        return None
    return f"{value.value:.2f} ({value.interval.low:.2f} to {value.interval.high:.2f})"


def _metric(name: str) -> Cell:
    return lambda line: _estimated(line.metrics.get(name))


def _overhead(name: str) -> Cell:
    return lambda line: None if line.overhead is None else f"{getattr(line.overhead, name):.1%}"


# Columns of each metric of the paper, by heading.
COLUMNS: dict[str, dict[str, Cell]] = {
    "fid": {"FID published": _published("fid"), "FID measured": lambda line: _estimated(line.frechet)},
    "is": {"IS published": _published("is"), "IS measured": _metric("inception_score")},
    "clip": {"CLIP published": _published("clip"), "CLIP measured": _metric("clip_score")},
    "overhead": {
        "overhead published": _published("overhead"),
        "overhead computed": _overhead("defined"),
        "overhead measured": _overhead("measured"),
    },
}
