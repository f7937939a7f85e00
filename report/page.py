"""The report as one HTML file that needs nothing else: no network, no script but its own."""

from __future__ import annotations

from typing import Any

from errata.errors import ReportError
from errata.report import formatting
from errata.report.cards import cards_of
from errata.report.columns import main_columns, metric_columns
from errata.report.growth_plots import amplification_plot, growth_plot
from errata.report.metrics import metric_lines
from errata.report.pictures import Strips, groups_of, tile_of
from errata.report.plots import overhead_plot, pareto_plot
from errata.report.results import Report
from errata.report.text import headline_of, protocol_lines

_TEMPLATE = "page.html.j2"
# What a reader wants to have counted at a glance.
_TALLIED = ("pays", "better", "not distinguishable", "does not pay", "worse")


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
    environment.filters["breakable"] = lambda name: name.replace("+", "+\N{ZERO WIDTH SPACE}")
    environment.filters["tied"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return environment.get_template(_TEMPLATE).render(
        now=_told(report),
        pareto=pareto_plot(report),
        groups=groups_of(report, strips),
        tile=tile_of(report),
        recorded=_told(recorded) if recorded is not None else None,
    )


def _told(report: Report) -> dict[str, Any]:
    """What the page says of a report, without its images."""
    return {
        "report": report,
        "headline": headline_of(report),
        "tally": _tally(report),
        "columns": main_columns(report),
        "metrics": metric_columns(report),
        "sections": [_section(report, artifact) for artifact in report.artifacts],
        "protocol": protocol_lines(report),
        "metric_protocol": metric_lines(report),
        "has_rivals": any(row.is_rival for row in report.rows),
    }


def _tally(report: Report) -> dict[str, int]:
    """How often each verdict was given to a corrected plan; one that repeats another's steps is left out."""
    kinds = [row.verdict.kind for row in report.rows if row.is_corrected and row.same_steps_as is None]
    return {kind: kinds.count(kind) for kind in _TALLIED if kind in kinds}  # type: ignore[arg-type]


def _section(report: Report, artifact: str) -> dict[str, Any]:
    """What the page says of one artifact."""
    growth = report.growth.get(artifact, {})
    amplification = growth.get("amplification")
    return {
        "artifact": artifact,
        "plain": next((row for row in report.of(artifact) if row.verdict.kind == "uncorrected"), None),
        "size": report.sizes.get(artifact),
        "cards": cards_of(report, artifact),
        "has_rivals": any(row.rivals for row in report.of(artifact)),
        "overhead": overhead_plot(report, artifact),
        "growth": growth_plot(artifact, growth) if growth.get("relative") else "",
        "amplification": amplification_plot(artifact, amplification) if amplification else "",
        "samples": growth.get("samples"),
    }


__all__ = ["Strips", "html", "require_jinja2"]
