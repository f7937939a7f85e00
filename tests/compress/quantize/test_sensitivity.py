"""Sensitivity: one layer at a time, measured on the whole network."""

import copy
import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from errata.calibration import CalibrationSet
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.sensitivity import SensitivityRow, SensitivityTable, measure
from errata.compress.quantize.simulation import quantize_weights, range_table, simulate, simulated_weight
from errata.errors import CalibrationError, RecipeError
from errata.runtime.recipes.quantization import Quantization
from errata.runtime.recipes.recipe import DeepCache, Recipe
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext

BAD = "down_blocks.1.resnets.1.conv2"
# A recipe that is quick to measure: these, and nothing else, are quantized.
FEW = Quantization(
    weight_bits=4,
    activation_bits=8,
    modules_to_not_convert=(
        "up_blocks",
        "mid_block",
        "down_blocks.0",
        "down_blocks.1.attentions.0",
        "conv_*",
    ),
)


@pytest.fixture(scope="module")
def table(tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet) -> SensitivityTable:
    return measure(tiny_pipeline, tiny_calibration, "w4a8", samples=4, steps=[0, 3])


def changed(pipe: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> DDIMPipeline:
    """A copy to alter; its trajectories are still close enough, so its origin is not checked."""
    monkeypatch.setattr("errata.compress.quantize.sensitivity.check_weights", lambda *_: None)
    return DDIMPipeline(unet=copy.deepcopy(pipe.unet), scheduler=pipe.scheduler)


def processors_of(unet: nn.Module) -> dict[str, int]:
    return {
        name: id(module.processor) for name, module in unet.named_modules() if isinstance(module, Attention)
    }


def row_of(table: SensitivityTable, name: str) -> SensitivityRow:
    return next(row for row in table.rows if row.name == name)


def test_every_layer_and_attention_has_a_row(table: SensitivityTable, tiny_pipeline: DDIMPipeline) -> None:
    scheme = Scheme.of(tiny_pipeline.unet, Recipe.named("w4a8"), branch=0)
    names = [layer.name for layer in scheme.layers] + [attention.name for attention in scheme.attentions]
    assert [row.name for row in table.rows] == names
    assert table.steps == (0, 3)
    assert all(len(row.errors) == 2 and min(row.errors) > 0 for row in table.rows)
    assert row_of(table, "conv_in").scheme == "w8a8"
    assert row_of(table, "mid_block.attentions.0").scheme == "attention a8"


@torch.no_grad()
@pytest.mark.parametrize("name", [BAD, "up_blocks.0.resnets.2.conv1", "time_embedding.linear_2"])
def test_a_row_is_what_an_independent_computation_gives(
    table: SensitivityTable, tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, name: str
) -> None:
    scheme = Scheme.of(tiny_pipeline.unet, Recipe.named("w4a8"), branch=0)
    alone = Scheme(layers=tuple(layer for layer in scheme.layers if layer.name == name))
    ranges = observe_ranges(tiny_pipeline.unet, tiny_calibration, alone)  # of all six steps
    tensors = quantize_weights(tiny_pipeline.unet, alone) | range_table(ranges)
    context = StepContext()
    simulated = simulate(tiny_pipeline.unet, alone, tensors, context)
    for step, error in zip(table.steps, row_of(table, name).errors, strict=True):
        x = next(tiny_calibration.batches(step, limit=4)).sample
        expected = tiny_pipeline.unet(x, tiny_calibration.timesteps[step]).sample
        with context.at(step):
            found = simulated(x, tiny_calibration.timesteps[step]).sample
        # A random sample of activations decides the range, another one for another scheme.
        assert float((found - expected).norm() / expected.norm()) == pytest.approx(error, rel=0.02)


@torch.no_grad()
def test_a_layer_that_rounds_badly_ranks_first(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = changed(tiny_pipeline, monkeypatch)
    weight: Any = pipe.unet.get_submodule(BAD).weight
    weight[:, 0, 0, 0] = 30 * weight.abs().max()  # in every row: all others round to zero
    norm: Any = pipe.unet.get_submodule(BAD.replace("conv2", "norm2"))
    norm.weight[0] = norm.bias[0] = 0.0  # and nothing ever comes in where the outliers are
    table = measure(pipe, tiny_calibration, Recipe(quantization=FEW), samples=4, steps=[2])
    assert table.ranked()[0].name == BAD
    assert table.ranked()[0].mean > 2 * table.ranked()[1].mean
    assert BAD in table.suggestion()
    assert "--bits NAME=8) for" in table.suggestion()


@torch.no_grad()
def test_a_layer_on_its_grid_has_no_error(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = changed(tiny_pipeline, monkeypatch)
    scheme = Scheme.of(pipe.unet, Recipe(quantization=FEW), branch=0)
    layer = next(layer for layer in scheme.layers if layer.name.endswith("time_emb_proj"))
    # Codes that reach both ends of the range, so that the search finds this very scale again.
    weight: Any = pipe.unet.get_submodule(layer.name).weight
    steps = torch.randint(-127, 128, weight.shape).float()
    steps[:, 0], steps[:, 1] = 127, -127
    weight.copy_(steps * 0.01)
    simulated = simulated_weight(layer, quantize_weights(pipe.unet, Scheme(layers=(layer,))))
    assert torch.allclose(simulated, weight, atol=1e-6)
    table = measure(pipe, tiny_calibration, Recipe(quantization=FEW), samples=4, steps=[2])
    assert row_of(table, layer.name).mean < 1e-5
    assert table.ranked()[-1].name == layer.name


def test_the_pipeline_is_left_as_it_was(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    processors = processors_of(tiny_pipeline.unet)
    measure(tiny_pipeline, tiny_calibration, Recipe(quantization=FEW), samples=2, steps=1)
    after = tiny_pipeline.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert processors_of(tiny_pipeline.unet) == processors


def test_more_bits_hurt_less_and_a_cache_changes_nothing(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    four = measure(tiny_pipeline, tiny_calibration, Recipe(quantization=FEW), samples=4, steps=[3, 0])
    recipe = Recipe(quantization=replace(FEW, bits={BAD: 8}), cache=DeepCache(interval=3))
    mixed = measure(tiny_pipeline, tiny_calibration, recipe, samples=4, steps=[0, 3])
    assert row_of(mixed, BAD).scheme == "w8a8"
    assert row_of(mixed, BAD).mean < 0.3 * row_of(four, BAD).mean
    assert [row for row in mixed.rows if row.name != BAD] == [row for row in four.rows if row.name != BAD]
    assert all(row.name.startswith(("time_embedding", "down_blocks.1")) for row in mixed.rows)
    assert not any(row.name.startswith("down_blocks.1.attentions.0") for row in mixed.rows)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, (0,)), (2, (0, 5)), (3, (0, 2, 5)), (None, (0, 1, 2, 3, 4, 5))]
)
def test_steps_are_evenly_spaced(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    steps: int | None,
    expected: tuple[int, ...],
) -> None:
    monkeypatch.setattr(
        "errata.compress.quantize.sensitivity._step_errors",
        lambda subject, swaps, rows: dict.fromkeys(swaps, 0.5),
    )
    recipe = Recipe(quantization=FEW)
    assert measure(tiny_pipeline, tiny_calibration, recipe, samples=1, steps=steps).steps == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 7}, "steps=7; 6 steps were recorded"),
        ({"steps": 0}, "steps=0"),
        ({"steps": [6]}, r"steps=\[6\]; recorded steps are 0-5"),
        ({"steps": []}, "recorded steps are 0-5"),
        ({"samples": 0}, "samples=0; allowed are whole numbers of at least 1"),
    ],
)
def test_bad_requests_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        measure(tiny_pipeline, tiny_calibration, "w4a8", **options)


def test_a_recipe_without_a_quantizer_is_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    with pytest.raises(RecipeError, match="deepcache-3 quantizes nothing"):
        measure(tiny_pipeline, tiny_calibration, "deepcache-3")


def test_trajectories_of_another_model_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    other = DDIMPipeline(unet=copy.deepcopy(tiny_pipeline.unet), scheduler=tiny_pipeline.scheduler)
    other.unet.conv_in.bias.data += 1
    with pytest.raises(CalibrationError, match="recorded from another model"):
        measure(other, tiny_calibration, "w4a8")


def example() -> SensitivityTable:
    def row(name: str, bits: int | None, *errors: float) -> SensitivityRow:
        scheme = "attention a8" if bits is None else f"w{bits}a8"
        return SensitivityRow(
            name=name, scheme=scheme, weight_bits=bits, weights=1000 if bits else 0, errors=errors
        )

    rows = (
        row("first", 8, 0.01, 0.02),
        row("second", 4, 0.3, 0.1),
        row("third", None, 0.1, 0.2),
        row("fourth", 4, 0.0, 0.0),
    )
    return SensitivityTable(recipe="w4a8", steps=(0, 7), samples=16, rows=rows)


def test_text_is_ranked_aligned_and_ends_in_a_suggestion() -> None:
    title, head, *lines, suggestion = example().text().splitlines()
    assert title == "w4a8: one at a time, 2 steps, 16 samples each"
    assert [line.split()[0] for line in lines] == ["second", "third", "first", "fourth"]
    assert len({len(line) for line in [head, *lines]}) == 1
    assert lines[0].split() == ["second", "w4a8", "1,000", "20.000%", "30.000%", "0"]
    assert suggestion == (
        "suggestion: 8 bits (bits, --bits NAME=8) for second (1 of 4 rows, 33.3% of the weights, 64% of the "
        "summed squared error)"
    )


def test_what_has_no_four_bit_weights_is_suggested_for_floating_point() -> None:
    rows = tuple(row for row in example().rows if row.name != "second")
    text = SensitivityTable(recipe="w4a8", steps=(0, 7), samples=16, rows=rows).suggestion()
    assert "floating point (modules_to_not_convert, --keep NAME) for third (" in text
    zero = SensitivityTable(recipe="w4a8", steps=(0, 7), samples=16, rows=rows[-1:])
    assert zero.suggestion() == "suggestion: nothing to spare, no layer has any error"
    assert [row.name for row in example().heaviest(0.99)] == ["second", "third"]


def test_json_and_csv_hold_the_same() -> None:
    value = json.loads(json.dumps(example().to_json()))
    assert value["suggested"] == ["second"]
    assert [row["name"] for row in value["rows"]] == ["first", "second", "third", "fourth"]
    lines = list(csv.DictReader(io.StringIO(example().to_csv())))
    for line, row in zip(lines, value["rows"], strict=True):
        assert line["name"] == row["name"]
        assert [float(line["step 0"]), float(line["step 7"])] == row["errors"]
        assert float(line["mean"]) == row["mean"]
