from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress import LearnedRounding, Quantization, Recipe
from errata.compress.jobs.progress import BlockReport
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.simulation import quantize_weights, range_table
from errata.compress.rounding.learned_rounding import learn_rounding
from errata.runtime.scheme import Scheme

ROUNDING = LearnedRounding(iterations=20, learning_rate=0.1, samples=24, batch_size=8)
Tensors = dict[str, Tensor]


class Stages:
    """A stage function that keeps its results, and dies when it should make the stage of a given number."""

    def __init__(self, done: Mapping[str, Tensors] | None = None, *, dies_at: int | None = None) -> None:
        self.done = dict(done or {})
        self.made: list[str] = []
        self._dies_at = dies_at

    def __call__(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Tensors:
        if name not in self.done:
            if len(self.made) == self._dies_at:
                raise KeyboardInterrupt
            self.done[name] = dict(make())
            self.made.append(name)
        return self.done[name]


class Work:
    """The tiny pipeline, its calibration, and the table of nearest rounding."""

    def __init__(self, unet: Any, recorded: Any, *, bits: int = 4) -> None:
        self.unet, self.recorded = unet, recorded
        recipe = Recipe(quantization=Quantization(weight_bits=bits, activation_bits=8))
        self.scheme = Scheme.of(unet, recipe, branch=0)
        self.table = quantize_weights(unet, self.scheme)
        self.table |= range_table(observe_ranges(unet, recorded, self.scheme))

    def learn(
        self, stages: Stages, scratch: Path, rounding: LearnedRounding = ROUNDING
    ) -> tuple[Tensors, list[BlockReport]]:
        reports: list[BlockReport] = []
        updates = learn_rounding(
            self.unet, self.recorded, self.scheme, self.table, rounding,
            stage=stages, report=reports.append, scratch=scratch,
        )  # fmt: skip
        return updates, reports


@pytest.fixture(scope="module")
def work(tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet) -> Work:
    return Work(tiny_pipeline.unet, tiny_calibration)


@pytest.fixture(scope="module")
def whole(work: Work, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, list[BlockReport]]:
    scratch = tmp_path_factory.mktemp("scratch")
    unet_before = {name: value.clone() for name, value in work.unet.state_dict().items()}
    table_before = {name: value.clone() for name, value in work.table.items()}
    state = torch.get_rng_state()
    result = work.learn(Stages(), scratch)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(scratch.iterdir()) == []
    for name, value in work.unet.state_dict().items():
        assert torch.equal(value, unet_before[name])
    for name, value in work.table.items():
        assert torch.equal(value, table_before[name])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in work.unet.modules())
    return result


def test_every_block_gets_better(whole: tuple[Tensors, list[BlockReport]]) -> None:
    _, reports = whole
    assert [report.index for report in reports] == list(range(len(reports)))
    assert {report.total for report in reports} == {len(reports)}
    assert not any(report.is_resumed for report in reports)
    names = [report.name for report in reports]
    assert names[:4] == [
        "time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "down_blocks.0.resnets.0"
    ]  # fmt: skip
    assert names[-1] == "conv_out"
    assert all(0 <= report.loss_after <= report.loss_before for report in reports)
    blocks = [report for report in reports if "resnets" in report.name or "attentions" in report.name]
    assert all(report.loss_after < report.loss_before for report in blocks)
    assert sum(report.loss_after for report in blocks) < 0.9 * sum(report.loss_before for report in blocks)


def test_codes_and_scales_stay_where_they_belong(
    work: Work, whole: tuple[Tensors, list[BlockReport]]
) -> None:
    updates, _ = whole
    assert set(updates) <= set(work.table)
    moved = 0
    for layer in work.scheme.layers:
        name = f"{layer.name}.codes"
        if name not in updates:
            continue
        codes, nearest = updates[name], work.table[name]
        assert codes.dtype == torch.int8
        assert codes.abs().max() <= 2 ** (layer.weight_bits - 1) - 1
        assert (codes.int() - nearest.int()).abs().max() <= 1
        moved += int((codes != nearest).sum())
    assert moved > 100
    scales = [name for name in updates if name.endswith(".scale")]
    assert any(name.endswith(".probabilities.scale") for name in scales)
    for name in scales:
        assert updates[name].dtype == torch.float32
        assert updates[name].shape == work.table[name].shape
        assert (updates[name] > 0).all()
    assert any(not torch.equal(updates[name], work.table[name]) for name in scales)


def test_a_run_resumed_twice_gives_the_same_bytes(
    work: Work, whole: tuple[Tensors, list[BlockReport]], tmp_path: Path
) -> None:
    expected, whole_reports = whole
    done: dict[str, Tensors] = {}
    for total in (4, min(30, len(whole_reports) - 1)):
        killed = Stages(done, dies_at=total - len(done))
        with pytest.raises(KeyboardInterrupt):
            work.learn(killed, tmp_path)
        assert list(tmp_path.iterdir()) == []
        done = killed.done
        assert len(done) == total
    resumed = Stages(done)
    updates, reports = work.learn(resumed, tmp_path)
    assert set(updates) == set(expected)
    assert all(torch.equal(updates[name], expected[name]) for name in expected)
    assert [report.is_resumed for report in reports].count(True) == len(done)
    assert [report.loss_after for report in reports] == [report.loss_after for report in whole_reports]
    again, reports = work.learn(Stages(resumed.done), tmp_path)  # now nothing is computed
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert all(report.is_resumed for report in reports)


def test_a_failure_leaves_no_files(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(sum(1 for _ in tmp_path.rglob("*.rows")))
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("errata.compress.rounding.learned_rounding.reconstruct", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        work.learn(Stages(), tmp_path)
    assert seen[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_training_mode_is_learned_as_in_evaluation(
    work: Work, whole: tuple[Tensors, list[BlockReport]], tmp_path: Path
) -> None:
    first = {name: value for name, value in whole[0].items() if name.startswith("time_embedding")}
    work.unet.train()
    try:
        stages = Stages(dies_at=2)
        with pytest.raises(KeyboardInterrupt):
            work.learn(stages, tmp_path)
        assert work.unet.training
    finally:
        work.unet.eval()
    found = {name: value for stage in stages.done.values() for name, value in stage.items()}
    assert all(torch.equal(found[name], value) for name, value in first.items())


def test_a_guided_network_with_cross_attention(network: Callable[[str], Any], tmp_path: Path) -> None:
    case = network("nomid")
    times, samples = (501, 301, 101), torch.randn(3, 6, 4, 8, 8)
    context = 3 * torch.randn(6, 5, 12)
    context[:3] = context[0]  # the unconditional rows

    def batches(
        step: int, *, start: int = 0, limit: int | None = None, batch_size: int | None = None
    ) -> list[Record]:
        cond = {"encoder_hidden_states": context}
        records = []
        for sample in range(start, min(start + (limit or 3), 3)):
            rows = [sample, sample + 3]
            records.append(
                Record(
                    sample=samples[step][rows],
                    timestep=torch.tensor(times[step]),
                    cond={name: value[rows] for name, value in cond.items()},
                    step=step,
                )
            )
        return records

    recorded = SimpleNamespace(
        num_steps=3,
        num_samples=3,
        calls_per_step=1,
        rows_per_sample=2,
        sample_shape=(4, 8, 8),
        timesteps=times,
        batches=batches,
    )
    work = Work(case.unet, recorded)
    rounding = LearnedRounding(iterations=4, learning_rate=0.1, samples=6, batch_size=6)
    updates, reports = work.learn(Stages(), tmp_path, rounding)
    assert len(reports) > 20
    assert all(report.loss_after <= report.loss_before for report in reports)
    transformers = [report for report in reports if ".transformer_blocks." in report.name]
    assert any(report.loss_after < report.loss_before for report in transformers)
    assert any(name.endswith(".attn2.key.scale") for name in updates)
