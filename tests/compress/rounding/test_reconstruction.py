import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from errata.compress import LearnedRounding
from errata.compress.quantize.quantizers import StepwiseQuantizer, quantize_weight
from errata.compress.quantize.simulation import SimulatedLayer
from errata.compress.rounding.blocks import Block
from errata.compress.rounding.capture import BlockData
from errata.compress.rounding.reconstruction import Reconstruction, reconstruct, seed_of
from errata.compress.rounding.row_store import RowStore
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

ROUNDING = LearnedRounding(iterations=300, learning_rate=0.05, batch_size=32, scale_learning_rate=0.0)


class Problem:
    """One linear layer as a block, 4-bit weights, with correlated inputs."""

    def __init__(
        self, folder: Path, *, inputs: int, outputs: int, rows: int = 256, activations: bool = False
    ) -> None:
        self.layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.scheme = LayerScheme(
            name="layer", kind="linear", weight_bits=4, activation_bits=8 if activations else None,
            input_widths=(inputs,),
        )  # fmt: skip
        self.context = StepContext()
        codes, weight_scale = quantize_weight(self.layer.weight, bits=4)
        self.table = {"layer.codes": codes, "layer.weight_scale": weight_scale[None]}
        quantizers = []
        if activations:
            self.table["layer.input.0.scale"] = torch.full((4,), 0.1)  # too coarse, so there is much to gain
            scale, zero_point = torch.full((4,), 0.1), torch.full((4,), 128.0)
            quantizers = [StepwiseQuantizer(scale, zero_point, bits=8, context=self.context)]
        self.module = SimulatedLayer(self.scheme, self.layer, self.table, quantizers)
        # A few directions carry nearly everything.
        self.x = torch.randn(rows, 2) @ torch.randn(2, inputs) + 0.05 * torch.randn(rows, inputs)
        self.store = RowStore(folder)
        self.steps = torch.arange(rows) % 3  # step 3 has no row
        batch = {"argument.0": self.x, "target": self.layer(self.x), "step": self.steps}
        self.store.append(batch, rows=rows)

    def loss(self, codes: Tensor) -> float:
        weight = codes.float() * self.table["layer.weight_scale"][0][:, None]
        return float((self.x @ (weight - self.layer.weight).T).square().mean())

    def solve(self, rounding: LearnedRounding = ROUNDING) -> Reconstruction:
        block = Block(name="layer", layers=(self.scheme,), attentions=())
        data = BlockData(self.store, {}, torch.device("cpu"))
        with self.store:
            return reconstruct(
                self.module, block, data, {"layer": self.layer.weight}, self.table, rounding, self.context
            )


def test_correlated_inputs_make_another_rounding_much_better_than_nearest(tmp_path: Path) -> None:
    problem = Problem(tmp_path, inputs=32, outputs=8)
    found = problem.solve()
    codes, nearest = found.updates["layer.codes"], problem.table["layer.codes"]
    assert found.loss_before == pytest.approx(problem.loss(nearest), rel=1e-4)
    assert found.loss_after == pytest.approx(problem.loss(codes), rel=1e-4)
    assert found.loss_after < found.loss_before / 3
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 7
    assert (codes.int() - nearest.int()).abs().max() == 1
    assert set(found.updates) == {"layer.codes"}


def test_tiny_problems_are_solved_nearly_as_well_as_by_trying_everything(tmp_path: Path) -> None:
    problem = Problem(tmp_path, inputs=6, outputs=16)
    scale = problem.table["layer.weight_scale"][0][:, None]
    floor = (problem.layer.weight / scale).floor()
    best = torch.full((16,), float("inf"))  # outputs do not touch each other
    for ups in itertools.product((0.0, 1.0), repeat=6):
        codes = (floor + torch.tensor(ups)).clamp(-7, 7)
        error = (problem.x @ (codes * scale - problem.layer.weight).T).square().mean(dim=0)
        best = torch.minimum(best, error)
    nearest, learned, optimum = (
        problem.loss(problem.table["layer.codes"]),
        problem.solve(),
        float(best.mean()),
    )
    assert optimum < 0.4 * nearest  # else there was nothing to find
    assert optimum <= learned.loss_after * 1.0001
    assert nearest - learned.loss_after > 0.7 * (nearest - optimum)


def test_scales_move_only_where_there_are_rows_and_stay_positive(tmp_path: Path) -> None:
    problem = Problem(tmp_path, inputs=16, outputs=8, activations=True)
    rounding = LearnedRounding(iterations=200, learning_rate=0.05, batch_size=32, scale_learning_rate=0.02)
    found = problem.solve(rounding)
    scale = found.updates["layer.input.0.scale"]
    assert scale.dtype == torch.float32
    assert (scale[:3] < 0.1 * 0.9).all()
    assert (scale > 0).all()
    assert scale[3] == problem.table["layer.input.0.scale"][3]
    assert found.loss_after < 0.9 * found.loss_before
    own_scale = dict(problem.module.named_buffers())["quantizers.0.scale"]
    assert torch.equal(own_scale, problem.table["layer.input.0.scale"])  # the module is left alone


def test_a_minibatch_moves_the_scales_of_its_steps_only(tmp_path: Path) -> None:
    problem = Problem(tmp_path, inputs=16, outputs=8, rows=6, activations=True)
    one_batch = LearnedRounding(iterations=1, learning_rate=1e-6, batch_size=1, scale_learning_rate=0.1)
    scale = problem.solve(one_batch).updates["layer.input.0.scale"]
    assert (scale != 0.1).sum() == 1


def test_results_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    results = []
    for turn, seed in enumerate((0, 0, 1)):
        torch.manual_seed(5)
        problem = Problem(tmp_path / str(turn), inputs=16, outputs=8, activations=True)
        torch.manual_seed(turn)
        state = torch.get_rng_state()
        rounding = LearnedRounding(iterations=30, batch_size=8, seed=seed)
        results.append(problem.solve(rounding))
        assert torch.equal(torch.get_rng_state(), state)
    for name, value in results[0].updates.items():
        assert torch.equal(value, results[1].updates[name])
    assert results[0].loss_after == results[1].loss_after
    assert results[0].loss_after != results[2].loss_after
    assert len({seed_of(0, "a"), seed_of(0, "b"), seed_of(1, "a")}) == 3


def test_what_does_not_help_is_not_kept(tmp_path: Path) -> None:
    problem = Problem(tmp_path, inputs=16, outputs=8, activations=True)
    wild = LearnedRounding(iterations=3, learning_rate=50.0, batch_size=4, scale_learning_rate=1.0)
    found = problem.solve(wild)
    assert found.updates == {}
    assert found.loss_after == found.loss_before > 0
