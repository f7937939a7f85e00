import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from errata.errors import ReportError
from errata.report import Estimate, Interval, Overhead, Protocol, Report, Row, Size, free_run_text, text_table
from errata.report.bundled_report import recorded_digits
from errata.report.free_runs import free_runs
from errata.report.image_grid import strip
from errata.report.plots import overhead_plot, pareto_plot
from errata.report.render import headline_of, html, markdown
from errata.report.tables import cards_of, main_columns, metric_columns
from errata.report.verdict import verdict_of_corrected, verdict_of_float, verdict_of_uncorrected

VOID = {"meta", "link", "img", "br", "use", "path", "input"}


def estimate(value: float, half: float = 0.4) -> Estimate:
    return Estimate(value, Interval(value - half, value + half))


def make_rows(artifact: str, *, change: float, samples: int) -> list[Row]:
    plain = Row(
        artifact=artifact,
        plan="none",
        steps="none",
        samples=samples,
        evaluations={"full": 3.0, "cached": 22.0},
        seconds_per_image=0.01,
        frechet=estimate(12.0),
        verdict=verdict_of_uncorrected(samples=samples, change_to_float=estimate(6.0)),
        overhead=Overhead(defined=0.0, measured=0.0, spread=(0.0, 0.0), batches=4),
        metrics={"psnr": estimate(20.0)},
    )
    corrected = Row(
        artifact=artifact,
        plan="all",
        steps="all",
        samples=samples,
        evaluations={"full": 6.0, "cached": 22.0},
        seconds_per_image=0.013,
        frechet=estimate(12.0 + change),
        verdict=verdict_of_corrected(
            frechet=12.0 + change, change=estimate(change), overhead=0.35, samples=samples
        ),
        overhead=Overhead(defined=0.35, measured=0.36, spread=(0.34, 0.37), batches=4),
        change=estimate(change),
        metrics={"psnr": estimate(21.0)},
        changes={"psnr": estimate(1.0)},
    )
    return [plain, corrected]


def make_row(artifact: str, plan: str, *, change: float, psnr_change: float, overhead: float) -> Row:
    """A corrected row whose changes are known to 0.4."""
    corrected = make_rows(artifact, change=change, samples=256)[1]
    return replace(
        corrected,
        plan=plan,
        compute=0.02,
        overhead=Overhead(defined=overhead, measured=overhead, spread=(overhead, overhead), batches=4),
        changes={"psnr": estimate(psnr_change)},
        metrics={"psnr": estimate(20.0 + psnr_change)},
    )


@pytest.fixture
def report() -> Report:
    samples = 256
    float_row = Row(
        artifact="float",
        plan="none",
        steps="none",
        samples=samples,
        evaluations={"full": 25.0},
        seconds_per_image=0.03,
        frechet=estimate(6.0),
        verdict=verdict_of_float(samples=samples),
    )
    protocol = Protocol(
        samples=samples,
        seed=0,
        batch_size=64,
        steps=25,
        image_size=(16, 16, 1),
        feature_network="block-means",
        feature_digest="ab" * 32,
        feature_dimension=4,
        reference="random images",
        reference_count=1797,
        resamples=200,
        machine="a <machine> & more",
        device="cpu",
        threads=2,
        versions={"errata": "0.1.0", "torch": "2.13.0"},
        date="2026-01-02T03:04:05+00:00",
        command="errata demo",
        notes=("Something to know.",),
    )
    rows = [
        float_row,
        *make_rows("w4a8", change=-2.0, samples=samples),
        *make_rows("deepcache-10", change=1.5, samples=samples),
    ]
    sizes = {"w4a8": Size(weights=1_000_000, float32=6_000_000, directory=1_010_000)}
    return Report(rows=tuple(rows), protocol=protocol, sizes=sizes, backends={"w4a8": {"onednn": 40}})


@pytest.fixture
def page(report: Report) -> str:
    strips = {(row.artifact, row.plan): strip(torch.rand(3, 1, 16, 16)) for row in report.rows}
    return html(report, strips)


class Elements(HTMLParser):
    """Counts elements and refuses a page whose tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    return elements


def test_page_is_well_formed_and_has_its_parts(page: str) -> None:
    elements = parsed(page)
    assert elements.seen.count("svg") == 3  # one an artifact, one for all; no growth without a float run
    assert elements.seen.count("img") == 6  # float, uncorrected, corrected for each of two artifacts
    assert page.count('src="data:image/png') == 5  # the float model's strip is embedded once
    assert elements.seen.count("table") == 3
    text = " ".join(elements.text)
    for expected in (
        "Of 2 corrected runs",
        "turn it off here",
        "ab" * 32,
        "Something to know.",
        "errata demo",
    ):
        assert expected in text


def test_page_needs_no_network(page: str) -> None:
    assert all(address.startswith(("data:", "#")) for address in parsed(page).addresses)
    assert re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page)) == []
    assert "@import" not in page


def test_page_escapes_what_it_is_told(page: str) -> None:
    assert "a &lt;machine&gt; &amp; more" in page


def test_a_recorded_report_gets_its_own_section(report: Report) -> None:
    elements = parsed(html(report, {}, recorded=report))
    assert elements.seen.count("table") == 4
    assert "Recorded result: 25 steps, 256 images per row" in elements.text
    assert elements.seen.count("img") == 0


def test_plot_follows_the_page_and_repeats(report: Report) -> None:
    plot = overhead_plot(report, "w4a8")
    assert "var(--blue)" in plot
    assert "var(--ink)" in plot
    assert "<style" not in plot
    assert "#01020" not in plot
    assert "float model" in plot
    assert plot == overhead_plot(report, "w4a8")
    ids = re.findall(r'id="([^"]+)"', plot + overhead_plot(report, "deepcache-10"))
    assert len(ids) == len(set(ids))


def test_json_survives_a_round_trip(report: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_json_of_another_schema_is_refused(report: Report) -> None:
    with pytest.raises(ReportError, match="schema 'errata-report/9'"):
        Report.from_json(report.to_json() | {"schema": "errata-report/9"})
    with pytest.raises(ReportError, match="does not fit schema"):
        Report.from_json(report.to_json() | {"rows": [{}]})


def test_text_table_is_aligned(report: Report) -> None:
    lines = text_table(report).splitlines()
    assert len(lines) == 2 + len(report.rows)
    ends = {line.index("full+cached") + len("full+cached") for line in lines[:1]}
    assert all(line[: ends.copy().pop()].strip()[-1] in "-d0123456789" for line in lines)
    assert lines[-1].endswith("worse")
    assert "+1.50 (+1.10 to +1.90)" in lines[-1]


def test_the_first_table_has_what_helps_at_no_extra_compute(report: Report) -> None:
    better, psnr_alone, worse, costly = (
        make_row("w4a8", plan, change=change, psnr_change=gain, overhead=overhead)
        for plan, change, gain, overhead in (
            ("better", -2.0, 1.0, 0.0),
            ("nearer", -0.1, 3.0, 0.0),
            ("worse", 1.0, 5.0, 0.0),
            ("costly", -5.0, 5.0, 0.02),
        )
    )
    plain, other = report.of("w4a8")[0], report.of("deepcache-10")[0]
    assert report.float_row is not None
    float_row = replace(report.float_row, compute=0.08)

    def best(*rows: Row) -> list[tuple[str, str]]:
        shown = replace(report, rows=(float_row, replace(plain, compute=0.02), *rows, other))
        assert [run.speed for run in free_runs(shown)] == [1.0, 4.0, None]
        assert [run.size for run in free_runs(shown)] == [1.0, 1 / 6, None]
        return [(run.row.artifact, run.plan) for run in free_runs(shown)]

    rest = ("deepcache-10", "")
    assert best() == [("float", ""), ("w4a8", ""), rest]
    assert best(worse, costly) == [("float", ""), ("w4a8", ""), rest]
    assert best(psnr_alone, worse) == [("float", ""), ("w4a8", "nearer"), rest]
    assert best(psnr_alone, better, worse, costly) == [("float", ""), ("w4a8", "better"), rest]
    text = free_run_text(replace(report, rows=(float_row, plain, better, other)))
    cells = r"^w4a8 +better +0\.17 × +4\.0 × +10\.00 \(9\.60 to 10\.40\) +21\.0 dB$"
    assert re.search(cells, text, re.MULTILINE)
    assert "worse" not in text


def test_markdown_holds_rows_verdicts_and_protocol(report: Report) -> None:
    text = markdown(report)
    assert "| w4a8, all | better | 10.00 (9.60 to 10.40) | −2.00 (−2.40 to −1.60) | 35 % |" in text
    assert "6 full + 22 cached" in text
    assert "turn it off here" in text
    assert "Fréchet distance in block-means" in text
    assert "| w4a8 | 1 MB | 6 MB | 0.167 |" in text


@pytest.mark.parametrize(("channels", "mode"), [(1, "LA"), (3, "RGBA")])
def test_strip_keeps_every_pixel(channels: int, mode: str) -> None:
    images = torch.randint(256, (3, channels, 4, 4)).float() / 255
    picture = Image.open(io.BytesIO(strip(images)))
    assert (picture.mode, picture.size) == (mode, (14, 4))
    pixels = torch.from_numpy(np.array(picture)).long()
    assert pixels[0, 4, -1] == 0  # the gap is transparent
    torch.testing.assert_close(pixels[:, 5:9, :-1].permute(2, 0, 1), (images[1] * 255).round().long())


def test_page_embeds_the_strips(report: Report) -> None:
    png = strip(torch.rand(3, 1, 16, 16))
    assert base64.b64encode(png).decode() in html(report, {("w4a8", "all"): png})


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(report: Report, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=rf"needs {package}.*pip install errata\[report\]"):
        html(report, {})


def test_the_recorded_report_of_an_earlier_form_is_shown(report: Report) -> None:
    recorded = recorded_digits()
    assert recorded is None or recorded.protocol.steps == 100
    if recorded is not None:
        page = html(report, {}, recorded=recorded)
        assert "Recorded result: 100 steps" in page
        assert "wall-clock time, milliseconds" in pareto_plot(recorded)  # it has no compute


def with_a_repeat(report: Report) -> Report:
    """The last row a second time, under another name."""
    again = replace(report.rows[-1], plan="twin", same_steps_as="all")
    return replace(report, rows=(*report.rows, again))


def test_a_repeated_plan_is_not_counted(report: Report) -> None:
    repeated = with_a_repeat(report)
    assert headline_of(repeated) == headline_of(report)
    assert "Of 2 corrected runs" in headline_of(repeated)
    assert Report.from_json(repeated.to_json()) == repeated


def test_a_report_of_an_earlier_release_is_read(report: Report) -> None:
    value = report.to_json()
    for row in value["rows"]:
        del row["same_steps_as"]
    assert Report.from_json(value) == report


def test_labels_of_one_place_are_joined(report: Report) -> None:
    plot = overhead_plot(with_a_repeat(report), "deepcache-10")
    assert "all, twin" in re.sub(r"<[^>]*>", "", plot)


def test_a_narrow_page_tells_of_the_hidden_columns(page: str) -> None:
    assert page.count("Scroll sideways for more columns.") == 3  # two tables, and the images
    assert ".hint { visibility: hidden;" in page


def test_a_full_page_has_its_plots_cards_and_metrics(full_page: str) -> None:
    elements = parsed(full_page)
    assert elements.seen.count("svg") == 4  # Pareto; distance, growth and amplification of the one artifact
    # At no extra compute, two of all rows, one of the alternatives of each plan.
    assert elements.seen.count("table") == 5
    text = " ".join(" ".join(elements.text).split())
    for expected in (
        "pays: a sentence about ends.",
        "no correction, 14 steps",
        "another model: not part of the verdict",
        "KID ↓",
        "Energy per image",
        "full call 60.0 ms, cached call 20.0 ms",
        "; a fact of this run",
        "seeds 5 to 260",
    ):
        assert expected in text


def test_only_rows_that_the_report_added_are_quiet(full_report: Report, full_page: str) -> None:
    added = sum(row.is_alternative for row in full_report.rows)
    assert full_page.count('<tr class="alternative">') == 2 * added  # in both tables
    assert full_page.count('role="switch"') == 3


def test_corrected_plans_are_joined_without_their_alternatives(full_report: Report) -> None:
    plot = overhead_plot(full_report, "w8a8").replace("\n", " ")
    (line,) = re.findall(r'<path d="M ([^"]*)"[^>]*stroke: var\(--line\); stroke-width: 1.4', plot)
    assert len(line.split("L")) == 3  # uncorrected, ends, all


def test_compute_matched_points_have_tooltips(full_report: Report) -> None:
    assert "<title>no correction, 14 steps: 10.50, change −1.50</title>" in overhead_plot(full_report, "w8a8")
    assert "<title>float, 8 steps: 9.50</title>" in pareto_plot(full_report)


def test_the_front_is_drawn_through_its_rows_alone(full_report: Report) -> None:
    assert "Pareto front" in pareto_plot(full_report)
    no_front = replace(full_report, rows=tuple(replace(row, front=None) for row in full_report.rows))
    assert "Pareto front" not in pareto_plot(no_front)


def test_alternatives_that_decide_come_first_the_best_ahead(full_report: Report) -> None:
    card = cards_of(full_report, "w8a8")[1]
    assert [each.name for each in card.alternatives] == [
        "no correction, 14 steps",
        "no correction",
        "no correction, 8 steps",
    ]
    assert [each.whisker.mark for each in card.alternatives] == ["bad", "bad", "bad"]
    assert [each.compute for each in card.alternatives] == ["70 %", "50 %", "60 %"]


def test_a_difference_beyond_the_scale_is_drawn_at_its_end(full_report: Report) -> None:
    rows = {row.plan: row for row in full_report.rows}
    far = replace(rows["8 steps"], frechet=estimate(99.0))
    plan = rows["ends"]
    beyond = replace(plan.alternatives[2], difference=estimate(-91.0))
    plan = replace(plan, alternatives=(*plan.alternatives[:2], beyond))
    report = replace(full_report, rows=(rows["none"], far, rows["14 steps"], plan))
    whisker = cards_of(report, "w8a8")[0].alternatives[-1].whisker
    assert (whisker.beyond, whisker.low, whisker.high, whisker.value) == ("below", 0, 0, 0)


def test_columns_without_numbers_are_left_out(report: Report, full_report: Report) -> None:
    def names(report: Report) -> list[str]:
        return [column.name for column in (*main_columns(report), *metric_columns(report))]

    assert {"Pareto front", "Compute per image", "Energy per image", "KID ↓"} <= set(names(full_report))
    assert set(names(report)) == {
        *("Verdict", "Fréchet distance", "Change", "Overhead", "Measured overhead", "PSNR to float"),
        *("Calls per image", "Time per image"),
    }


def test_markdown_holds_alternatives_and_metrics(full_report: Report) -> None:
    text = markdown(full_report)
    assert "| w8a8, all | no correction, 14 steps | 70 % | 10.50 | +2.50 (+2.00 to +3.00) |" in text
    assert "| w8a8, ends | 0.080 (0.070 to 0.090), change −0.040 |" in text
    assert "- KID: Squared maximum mean discrepancy" in text
