"""The recipes of the IEC paper: every row is there and says what the paper prints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from errata import correct
from errata.compress import CacheQuant, CacheSchedule, Recipe
from errata.errors import PlanError, RecipeError, ReportError

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "paper"
BASE = {
    "model": "M",
    "dataset": "D",
    "image_size": 8,
    "pipeline": "somewhere",
    "pipeline_class": "DDIMPipeline",
    "scheduler": {"class": "DDIMScheduler"},
    "steps": 10,
    "calibration": {"samples": 4, "batch_size": 2, "seed": 9},
    "samples": 6,
    "batch_size": 3,
    "reference": "real",
    "feature_network": "inception",
    "metrics": ["fid"],
}
ROW: dict[str, Any] = {"base": "base.yaml", "table": 1, "row": "W8A8", "recipe": "w8a8", "plan": None}
ROW["published"] = {"fid": "4.32"}


@pytest.fixture(scope="module")
def rows(paper: dict[str, Any]) -> dict[tuple[int, str], Any]:
    """Every row, by table and name of its file."""
    found = paper["paper_rows"].load_rows(sorted(PAPER.glob("table?")))
    return {(row.table, row.name): row for row in found}


def _schedule(row: Any) -> CacheSchedule:
    """One that the recipe allows; a searched one is stood in for by a uniform one."""
    calls = row.steps + (row.scheduler["class"] == "PNDMScheduler")
    cache = Recipe.named(row.recipe).cache
    if cache is None:
        return CacheSchedule.uncached(calls)
    if isinstance(cache, CacheQuant):
        cache = Recipe.named(f"deepcache-{cache.interval}").cache
    assert cache is not None
    assert not isinstance(cache, CacheQuant)
    return cache.schedule(calls, branch=1)


def test_every_row_is_there_with_the_printed_fid(rows: dict[tuple[int, str], Any], printed: Any) -> None:
    expected = printed.expected()
    assert len(expected) == 119
    assert {place: row.published["fid"] for place, row in rows.items()} == expected


def test_files_lie_in_the_folder_of_their_table(paper: dict[str, Any]) -> None:
    for folder in PAPER.glob("table?"):
        tables = {row.table for row in paper["paper_rows"].load_rows([folder])}
        assert tables == {int(folder.name.removeprefix("table"))}


def test_rows_of_a_folder_are_in_the_order_of_the_table(paper: dict[str, Any]) -> None:
    names = [row.name for row in paper["paper_rows"].load_rows([PAPER / "table2"])]
    assert names[9:] == [f"churches-{name}" for name in (*_pairs(3, 5, 10, 15), "float")] + [
        f"cifar10-{name}" for name in (*_pairs(3, 5, 10, 15), "float")
    ]


def _pairs(*intervals: int) -> list[str]:
    return [f"deepcache-{interval}{iec}" for interval in intervals for iec in ("", "-iec")]


def test_further_metrics_are_those_of_their_table(rows: dict[tuple[int, str], Any]) -> None:
    for (table, name), row in rows.items():
        further = {"imagenet": {"is"}, "coco": {"is", "clip"}}.get(name.partition("-")[0], set())
        assert set(row.published) - {"fid"} == ({"overhead"} if table == 5 else further), name
        assert not further & set(row.unsupported)
        assert (row.clip is not None) == ("clip" in further)
    best = rows[4, "coco-w8a8-cachequant-5-iec"].published
    assert best == {"fid": "22.83", "is": "40.91", "clip": "26.94"}
    assert rows[4, "imagenet-w4a8-cachequant-20-iec"].published == {"fid": "11.10", "is": "130.01"}


def test_recipes_are_those_that_the_files_are_named_after(rows: dict[tuple[int, str], Any]) -> None:
    for (_, name), row in rows.items():
        recipe = row.compression()
        if recipe is None:
            assert name.endswith("-float")
            continue
        bits = re.search(r"w([48])a8", name)
        quantization = recipe.quantization
        assert (quantization is None) == (bits is None), name
        if quantization is not None and bits is not None:
            assert quantization.weight_bits == int(bits[1])
            assert (quantization.rounding is not None) == (bits[1] == "4")  # the paper reconstructs W4A8
        interval = re.search(r"(?:deepcache|cachequant)-(\d+)", name)
        assert (recipe.cache is None) == (interval is None), name
        if recipe.cache is not None and interval is not None:
            assert recipe.cache.interval == int(interval[1])


def test_plans_fit_their_recipes_as_the_paper_places_them(rows: dict[tuple[int, str], Any]) -> None:
    for (table, name), row in rows.items():
        if row.plan is None:
            assert row.correction().corrects_nothing
            continue
        schedule, plan = _schedule(row), row.correction()
        assert plan.method == correct.IEC.paper()
        corrected = plan.resolve(schedule)
        if table < 5:
            assert corrected == ((0,) if name.startswith("coco") else schedule.full_steps), name


def test_placements_of_table_5_cost_what_it_prints(rows: dict[tuple[int, str], Any], printed: Any) -> None:
    for recipe, cells in printed.ABLATION.items():
        whole = float(cells[0].split()[1].rstrip("%"))
        for place, cell in zip(printed.PLACES, cells, strict=True):
            row = rows[5, f"cifar10-{recipe}-iec-{place}"]
            schedule = _schedule(row)
            share = len(row.correction().resolve(schedule)) / len(schedule.full_steps)
            assert row.published["overhead"] == cell.split()[1]
            assert f"{share * whole:.3g}%" == cell.split()[1], (recipe, place)


def test_rows_of_a_model_share_their_calibration(rows: dict[tuple[int, str], Any]) -> None:
    keys = {row.key.rpartition("-")[0]: row.key for row in rows.values()}
    assert set(keys) == {"cifar-10", "lsun-churches", "lsun-bedrooms", "imagenet", "ms-coco"}
    assert {row.key for row in rows.values()} == set(keys.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"colour": 1}, ReportError, "unknown key 'colour'; allowed are base, ambiguous"),
        ({"published": {"sfid": "1"}}, ReportError, "metric 'sfid' is unknown; allowed are fid, is"),
        ({"recipe": "w3a8"}, RecipeError, "unknown recipe 'w3a8'"),
        ({"recipe": None, "plan": {"method": "iec"}}, ReportError, "corrects the float model"),
        ({"plan": {"method": "magic"}}, ReportError, "method 'magic' is unknown; allowed are iec"),
        ({"plan": {"method": "iec", "steps": "some"}}, PlanError, "'some' is not a selection of steps"),
        ({"plan": {"method": "iec", "size": 1}}, ReportError, "iec has no such choice: .*'size'"),
        ({"pipeline_class": "Other"}, ReportError, "pipeline_class is 'Other'; allowed are DDIMPipeline"),
        ({"clip": "somewhere"}, ReportError, "has a clip, but no prompts to score images by"),
        ({"calibration": {"samples": 1}}, ReportError, r"calibration has \['samples'\]; it needs"),
        ({"table": None, "base": "missing.yaml"}, ReportError, "missing.yaml` cannot be read as YAML"),
    ],
)
def test_what_a_file_must_not_say(
    changes: dict[str, Any], error: type[Exception], message: str, paper: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(json.dumps(BASE))
    (tmp_path / "row.yaml").write_text(json.dumps(ROW | changes))
    with pytest.raises(error, match=message):
        paper["paper_rows"].load_row(tmp_path / "row.yaml")


def test_an_incomplete_file_and_an_empty_folder_are_told(paper: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text(json.dumps({"table": 1}))
    with pytest.raises(
        ReportError, match="row.yaml` is incomplete: .*missing .* add it there or in its base"
    ):
        paper["paper_rows"].load_row(tmp_path / "row.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="holds no .yaml file"):
        paper["paper_rows"].load_rows([tmp_path / "empty"])


def test_labels_run_through_all_classes_and_captions_follow_their_index(paper: dict[str, Any]) -> None:
    settings = {"classes": 5, "captions": (), "samples": 10, "guidance_scale": 1.5, "eta": 0.0}
    labelled = paper["paper_conditions"].Conditions(**settings)
    judged = [labelled.inputs(batch) for batch in (range(4), range(4, 10))]
    assert [label for inputs in judged for label in inputs["class_labels"]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert judged[0]["guidance_scale"] == 1.5
    recorded = labelled.calibration(samples=5, batch_size=3)
    assert recorded["inputs"] == [{"class_labels": [0, 1, 2]}, {"class_labels": [3, 4]}]
    captions = ("a", "b", "c", "d")
    told = paper["paper_conditions"].Conditions(
        **settings | {"classes": 0, "captions": captions, "samples": 3, "eta": 0.5}
    )
    assert told.inputs(range(1, 3)) == {"prompt": ["b", "c"], "guidance_scale": 1.5, "eta": 0.5}
    assert told.calibration(samples=1, batch_size=1)["prompts"] == ("d",)
