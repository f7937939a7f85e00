"""The tables of the IEC paper: every row is there, says what the paper prints, and is what its name says."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from errata import correct
from errata.compress import CacheQuant, CacheSchedule, Recipe

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "paper"


@pytest.fixture(scope="module")
def rows(paper: dict[str, Any]) -> dict[tuple[int, str], Any]:
    """Every row, by table and name."""
    found = paper["paper_configs"].load_rows(sorted(PAPER.glob("table?.yaml")))
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


def test_each_table_has_its_number_and_its_rows_with_unique_names(paper: dict[str, Any]) -> None:
    counts = {}
    for file in PAPER.glob("table?.yaml"):
        rows = paper["paper_table_file"].load_table(file)
        assert {row.table for row in rows} == {int(file.stem.removeprefix("table"))}
        assert max(Counter(row.name for row in rows).values()) == 1
        counts[file.stem] = len(rows)
    assert counts == {"table1": 13, "table2": 27, "table3": 43, "table4": 22, "table5": 14}


def test_rows_of_a_table_are_listed_by_dataset_and_interval(paper: dict[str, Any]) -> None:
    names = [row.name for row in paper["paper_configs"].load_rows([PAPER / "table2"])]
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


def test_recipes_are_those_that_the_rows_are_named_after(rows: dict[tuple[int, str], Any]) -> None:
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


def test_rows_have_the_recipes_and_settings_that_were_typed_in_by_hand(
    rows: dict[tuple[int, str], Any],
) -> None:
    learned = "iterations=3000,samples=1024,batch_size=32"
    assert rows[1, "churches-w4a8-iec"].recipe == f"w4a8-learned:{learned}"
    assert (
        rows[3, "cifar10-w4a8-cachequant-15"].recipe
        == f"w4a8-learned+cachequant-15:{learned},gain=least_squares"
    )
    assert rows[4, "coco-w4a8-cachequant-5-iec"].recipe == (
        "w4a8-learned+cachequant-5:iterations=3000,samples=512,batch_size=4,gain=least_squares"
    )
    best = rows[3, "bedrooms-w8a8-cachequant-2-iec"]
    assert (best.row, best.recipe) == ("4/8 CacheQ-N=2 +IEC", "w8a8+cachequant-2:gain=least_squares")
    assert best.ambiguous.endswith("take `w4a8-learned+cachequant-2`.")
    assert best.plan == {"method": "iec", "steps": "full"}
    assert (best.model, best.image_size, best.steps, best.samples) == ("LDM-4", 256, 100, 50000)
    cheap = rows[5, "cifar10-deepcache-10-iec-1-20"]
    assert (cheap.row, cheap.published) == ("Deepcache-N=10: ±1/20", {"fid": "9.55", "overhead": "1.4%"})
    assert cheap.plan == {"method": "iec", "steps": "ends:1/20 & full"}
    assert rows[5, "cifar10-w8a8-float"].published == {"fid": "4.19", "overhead": None}


def test_notes_stand_beside_the_rows_that_they_are_about(rows: dict[tuple[int, str], Any]) -> None:
    for (table, name), row in rows.items():
        is_learned = "w4a8-cachequant" in name
        assert ("quantization part" in row.unsupported) == is_learned, name
        assert ("image_size" in row.unsupported) == name.startswith("coco")
        is_ambiguous = {
            2: "deepcache-15" in name,
            3: name.startswith("bedrooms-w"),
            4: not name.endswith("float"),
        }
        assert (row.ambiguous is not None) == is_ambiguous.get(table, False), name


def test_rows_of_a_model_share_their_calibration(rows: dict[tuple[int, str], Any]) -> None:
    keys = {row.key.rpartition("-")[0]: row.key for row in rows.values()}
    assert set(keys) == {"cifar-10", "lsun-churches", "lsun-bedrooms", "imagenet", "ms-coco"}
    assert {row.key for row in rows.values()} == set(keys.values())


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
