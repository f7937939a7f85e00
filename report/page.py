"""The report as one HTML file that needs nothing else: no network, no script but its own few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.errors import ReportError
from errata.report import formatting
from errata.report.plots import cost_plot, overhead_plot
from errata.report.results import Report, Row
from errata.report.strips import data_uri, gap_of
from errata.report.text import headline_of, protocol_lines

_TEMPLATE = "page.html.j2"
# Shown height of one image, in CSS pixels; small images are enlarged by a whole factor.
_TILE = 64

Strips = Mapping[tuple[str, str], bytes]
"""PNG strip of the first seeds by artifact and plan; the float model's under `("float", "none")`."""


def require_jinja2() -> None:
    """Check that the page can be written.

    Raises:
        ReportError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as problem:
        raise ReportError("a report needs jinja2; run `pip install errata[report]`") from problem


def html(report: Report, strips: Strips, *, recorded: Report | None = None) -> str:
    """The page; `recorded` is an earlier, larger report shown in a section of its own.

    Raises:
        ReportError: jinja2 or matplotlib is not installed.
    """
    require_jinja2()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("errata.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["fmt"] = formatting
    environment.filters["tied"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return environment.get_template(_TEMPLATE).render(
        report=report,
        headline=headline_of(report),
        cost_plot=cost_plot(report),
        sections=[_section(report, artifact, strips) for artifact in report.artifacts],
        tile=_tile(report),
        protocol=protocol_lines(report),
        recorded=_recorded(recorded) if recorded is not None else None,
    )


def _section(report: Report, artifact: str, strips: Strips) -> dict[str, Any]:
    """What the page shows of one artifact besides its table rows."""
    rows = report.of(artifact)
    shown: list[Row] = [report.float_row] if report.float_row is not None else []
    shown.extend(rows)
    return {
        "artifact": artifact,
        "rows": rows,
        "size": report.sizes.get(artifact),
        "plot": overhead_plot(report, artifact),
        "strips": [
            {
                "label": "float model" if row.is_float else row.plan,
                "uri": data_uri(strips[row.artifact, row.plan]),
            }
            for row in shown
            if (row.artifact, row.plan) in strips
        ],
    }


def _tile(report: Report) -> dict[str, Any]:
    height, width, _ = report.protocol.image_size
    zoom = max(1, round(_TILE / height)) if height <= _TILE else _TILE * 2 / height
    return {"height": round(height * zoom), "is_enlarged": zoom > 1, "gap": round(gap_of(width) * zoom)}


def _recorded(recorded: Report) -> dict[str, Any]:
    return {
        "report": recorded,
        "headline": headline_of(recorded),
        "sections": [
            {"artifact": artifact, "plot": overhead_plot(recorded, artifact)}
            for artifact in recorded.artifacts
        ],
        "protocol": protocol_lines(recorded),
    }
