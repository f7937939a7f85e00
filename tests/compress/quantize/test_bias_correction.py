"""Bias correction: means agree afterwards, in order, from the quantized prefix; resumable; streaming."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import BlockReport
from errata.compress.quantize import bias_correction
from errata.compress.quantize.bias_correction import correct_biases, groups_of
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.recorded_inputs import MixedRows, mixed_rows
from errata.compress.quantize.simulation import quantize_weights, range_table, simulate
from errata.errors import RecipeError
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext

Tensors = dict[str, Tensor]


class Killed(Exception):
    """Ends a correction before its time."""


@dataclass
class Subject:
    """A network, its trajectories, and its quantization."""

    unet: nn.Module
    calibration_set: CalibrationSet
    scheme: Scheme
    table: Tensors

    def correct(self, **options: Any) -> Tensors:
        options.setdefault("stage", lambda name, make: make())
        return correct_biases(self.unet, self.calibration_set, self.scheme, self.table, **options)


@pytest.fixture(scope="module")
def subject(tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet) -> Subject:
    unet = tiny_pipeline.unet
    scheme = Scheme.of(unet, Recipe.named("w4a8"), branch=0)
    table = quantize_weights(unet, scheme) | range_table(observe_ranges(unet, tiny_calibration, scheme))
    # Weights of random networks round without a bias; shift them so that there is something to correct.
    generator = torch.Generator().manual_seed(0)
    for layer in scheme.layers:
        codes = table[f"{layer.name}.codes"]
        limit = 2 ** (layer.weight_bits - 1) - 1
        shift = torch.rand(codes.shape, generator=generator) < 0.2
        table[f"{layer.name}.codes"] = (codes + shift).clamp(max=limit).to(torch.int8)
    return Subject(unet, tiny_calibration, scheme, table)


@pytest.fixture(scope="module")
def biases(subject: Subject) -> Tensors:
    return subject.correct()


@torch.no_grad()
def outputs_of(unet: nn.Module, names: list[str], rows: list[MixedRows], context: StepContext) -> Tensors:
    """Mean output per channel of every layer, the slow way: all outputs kept, one mean in float64."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            flat = output.movedim(1, -1) if output.ndim == 4 else output
            kept[name].append(flat.reshape(-1, flat.shape[-1]).double())

        return keep

    handles = [unet.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for batch in rows:
        with context.at(batch.steps):
            batch.predict(unet)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).mean(dim=0) for name, values in kept.items()}


def test_every_biased_layer_gets_one(subject: Subject, biases: Tensors) -> None:
    expected = {
        f"{layer.name}.bias": subject.unet.get_parameter(f"{layer.name}.bias").shape
        for layer in subject.scheme.layers
    }
    assert {name: bias.shape for name, bias in biases.items()} == expected
    assert all(bias.dtype == torch.float32 for bias in biases.values())


def test_all_means_agree_afterwards(subject: Subject, biases: Tensors) -> None:
    names = [layer.name for layer in subject.scheme.layers]
    rows = mixed_rows(subject.calibration_set, samples=bias_correction.SAMPLES, batch_size=64)
    context = StepContext()
    original = outputs_of(subject.unet, names, rows, context)

    def worst(table: Tensors) -> float:
        found = outputs_of(simulate(subject.unet, subject.scheme, table, context), names, rows, context)
        return max(float((found[name] - original[name]).abs().max()) for name in names)

    assert worst(subject.table) > 0.05
    # In order, from the corrected prefix: not one mean is off, however deep the layer sits.
    assert worst({**subject.table, **biases}) < 1e-4


@torch.no_grad()
def test_a_single_linear_layer_is_the_closed_form(subject: Subject, biases: Tensors) -> None:
    """The first layer has a float prefix: `b' = b + E[(W - W_q) x]`."""
    name = "time_embedding.linear_1"
    unet: Any = subject.unet
    rows = mixed_rows(subject.calibration_set, samples=bias_correction.SAMPLES, batch_size=64)
    x = torch.cat([unet.time_proj(batch.timesteps) for batch in rows]).double()
    layer = unet.get_submodule(name)
    codes, scale = subject.table[f"{name}.codes"], subject.table[f"{name}.weight_scale"][0]
    gap = layer.weight.double() - codes.double() * scale.double()[:, None]
    expected = layer.bias.double() + (x @ gap.T).mean(dim=0)
    torch.testing.assert_close(biases[f"{name}.bias"].double(), expected, atol=1e-5, rtol=1e-5)


def test_nothing_changes_where_nothing_is_lost(subject: Subject) -> None:
    """A float model that lies on the grid, with inputs in floating point, keeps its biases."""
    layers = tuple(layer for layer in subject.scheme.layers if layer.activation_bits is None)
    scheme = Scheme(layers=layers)
    unet = copy.deepcopy(subject.unet)
    table = quantize_weights(unet, scheme)
    context = StepContext()
    simulated = simulate(unet, scheme, table, context)
    for layer in layers:
        weight: Any = simulated.get_submodule(layer.name).weight
        unet.get_parameter(f"{layer.name}.weight").data.copy_(weight)
    on_grid = Subject(unet, subject.calibration_set, scheme, table)
    for name, bias in on_grid.correct().items():
        torch.testing.assert_close(bias, unet.get_parameter(name).detach(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_constant_shift_of_every_layer_is_taken_back(subject: Subject, biases: Tensors) -> None:
    """Biases in the table are the start, and where they were off the prediction comes closer by far."""
    moved = {**subject.table, **{name: bias + 0.5 for name, bias in biases.items()}}
    again = Subject(subject.unet, subject.calibration_set, subject.scheme, moved).correct()
    for name, bias in again.items():
        torch.testing.assert_close(bias, biases[name], atol=2e-3, rtol=1e-3)
    rows = mixed_rows(subject.calibration_set, samples=24, batch_size=24)[0]
    context = StepContext()

    def error(table: Tensors) -> float:
        simulated = simulate(subject.unet, subject.scheme, table, context)
        with context.at(rows.steps):
            return float((rows.predict(simulated) - rows.predict(subject.unet)).square().mean())

    assert error({**moved, **again}) < 0.5 * error(moved)


def test_the_batch_size_does_not_matter(
    subject: Subject, biases: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ten layers in the order of the run; a kill ends the rest."""
    monkeypatch.setattr(bias_correction, "_BATCH_SIZE", 8)
    found: Tensors = {}

    def stage(name: str, make: Callable[[], Tensors]) -> Tensors:
        if len(found) > 10:
            raise Killed
        found.update(result := make())
        return result

    with pytest.raises(Killed):
        subject.correct(stage=stage)
    for name in found.keys() & biases.keys():
        torch.testing.assert_close(found[name], biases[name], atol=1e-4, rtol=1e-4)


def test_layers_that_read_the_same_share_a_pass(subject: Subject) -> None:
    names = [layer.name for layer in subject.scheme.layers]
    rows = mixed_rows(subject.calibration_set, samples=6, batch_size=6)
    groups = groups_of(subject.unet, names, rows[0])
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert groups[0] == ("time_embedding.linear_1",)
    assert groups[-1] == ("conv_out",)
    attention = "mid_block.attentions.0"
    assert (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v") in groups
    embeddings = next(group for group in groups if group[0].endswith(".time_emb_proj"))
    assert len(embeddings) == sum(name.endswith(".time_emb_proj") for name in names)
    assert all(len(group) == 1 for group in groups if "conv" in group[0])


def test_it_resumes_and_reports(subject: Subject, biases: Tensors) -> None:
    store: dict[str, Tensors] = {}
    reports: list[BlockReport] = []

    def stage(name: str, make: Callable[[], Tensors]) -> Tensors:
        if name not in store:
            if len(store) == 5:
                raise Killed
            store[name] = make()
        return store[name]

    with pytest.raises(Killed):
        subject.correct(stage=stage, report=reports.append)
    assert [report.is_resumed for report in reports] == [False] * 5

    def finish(name: str, make: Callable[[], Tensors]) -> Tensors:
        return store[name] if name in store else store.setdefault(name, make())

    reports.clear()
    resumed = subject.correct(stage=finish, report=reports.append)
    assert [report.is_resumed for report in reports] == [True] * 5 + [False] * (len(reports) - 5)
    assert [report.index for report in reports] == list(range(reports[0].total))
    assert all(0 <= report.loss_after <= report.loss_before for report in reports)
    assert resumed.keys() == biases.keys()
    assert all(torch.equal(resumed[name], biases[name]) for name in biases)


def test_the_network_is_left_alone(subject: Subject, tiny_pipeline: DDIMPipeline) -> None:
    before = {name: value.clone() for name, value in subject.unet.state_dict().items()}
    layers = tuple(layer for layer in subject.scheme.layers if layer.activation_bits is None)
    Subject(subject.unet, subject.calibration_set, Scheme(layers=layers), subject.table).correct()
    assert all(torch.equal(value, before[name]) for name, value in subject.unet.state_dict().items())
    assert not any(module._forward_pre_hooks for module in subject.unet.modules())


def test_a_layer_that_never_runs_is_an_error(subject: Subject) -> None:
    unet: Any = copy.deepcopy(subject.unet)
    unet.spare = nn.Linear(4, 4)
    rows = mixed_rows(subject.calibration_set, samples=6, batch_size=6)
    with pytest.raises(RecipeError, match="'spare' never runs.*modules_to_not_convert"):
        groups_of(unet, ["conv_in", "spare"], rows[0])


def test_nothing_quantized_needs_nothing(subject: Subject) -> None:
    assert Subject(subject.unet, subject.calibration_set, Scheme(), {}).correct() == {}


@pytest.mark.parametrize(("samples", "steps", "count"), [(48, 6, 48), (12, 6, 12), (4, 4, 4), (1000, 6, 48)])
def test_mixed_rows_spread_over_steps_and_trajectories(
    tiny_calibration: CalibrationSet, samples: int, steps: int, count: int
) -> None:
    rows = mixed_rows(tiny_calibration, samples=samples, batch_size=12)
    all_steps = torch.cat([batch.steps for batch in rows])
    assert len(all_steps) == sum(len(batch.x) for batch in rows) == count
    assert all(len(batch.x) <= 12 for batch in rows)
    found = all_steps.unique(return_counts=True)
    assert len(found[0]) == steps
    assert int(found[1].min()) == int(found[1].max())
    for batch in rows:
        times = [tiny_calibration.timesteps[step] for step in batch.steps.tolist()]
        assert batch.timesteps.tolist() == times
    if samples == 12:  # two of eight trajectories a step, another two at the next
        first = next(tiny_calibration.batches(0, limit=2))
        second = list(tiny_calibration.batches(1, limit=4, batch_size=2))[1]
        assert torch.equal(rows[0].x[:4], torch.cat([first.sample, second.sample]))


@torch.no_grad()
def test_mixed_rows_predict_what_each_step_predicts_alone(
    tiny_calibration: CalibrationSet, tiny_pipeline: DDIMPipeline
) -> None:
    (rows,) = mixed_rows(tiny_calibration, samples=6, batch_size=6)
    together = rows.predict(tiny_pipeline.unet)
    for row, step in enumerate(rows.steps.tolist()):
        alone = tiny_pipeline.unet(rows.x[row : row + 1], tiny_calibration.timesteps[step]).sample
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
