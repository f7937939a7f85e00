"""Learned rounding of a whole UNet, block by block, resumable after each."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import BlockListener, BlockReport
from errata.compress.quantize.partial_forward import call_order
from errata.compress.quantize.recorded_inputs import MixedSteps, spill_inputs
from errata.compress.quantize.simulation import SimulatedLayer, simulate
from errata.compress.rounding.blocks import Block, blocks_of
from errata.compress.rounding.capture import capture_block
from errata.compress.rounding.reconstruction import reconstruct, seed_of
from errata.compress.rounding.row_store import RowStore
from errata.journal import Stage
from errata.runtime.layers import float_layer
from errata.runtime.recipes.quantization import LearnedRounding
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import in_evaluation

_FIGURES = "figures"
_logger = logging.getLogger(__name__)


def learn_rounding(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    table: Mapping[str, Tensor],
    rounding: LearnedRounding,
    *,
    stage: Stage,
    report: BlockListener,
    scratch: Path | None = None,
) -> dict[str, Tensor]:
    """Learn how the weights of every block are rounded, and its activation scales with them.

    Blocks follow one another as the UNet runs them: each is given what the blocks before it, already learned,
    make of recorded inputs of all steps, and should answer what the float UNet answers there. A block that
    learning does not help keeps its initial codes and scales, with `loss_after == loss_before` in its report.

    Memory holds the UNet, its simulated copy, and one batch; everything that grows with `rounding.samples` is
    in temporary files, gone when this returns or raises.

    Args:
        unet: the float UNet, float32; left as it is.
        calibration_set: its trajectories.
        scheme: what is quantized.
        table: initial codes, weight scales, activation ranges, and float parameters that replace the UNet's.
        rounding: how long, how fast, on how much, and the seed.
        stage: `stage(name, make)` returns the tensors that an earlier run stored under that name, or stores
            and returns those of `make()`. A block is one stage; its result does not depend on whether earlier
            ones were resumed.
        report: called after each block.
        scratch: directory for the temporary files; by default the system's.

    Returns:
        Entries that replace those of `table`: `<layer>.codes`, int8, each at the floor or the ceiling of the
        float weight in units of its scale, and `<site>.scale`, float32, `(T,)`.

    Raises:
        TypeError: a block has arguments, or an answer, that cannot be stored as tensors.

    Source: AdaRound (Nagel et al., ICML 2020) in blocks as BRECQ (Li et al., ICLR 2021), with one activation
    scale a step as CacheQuant and EDA-DM; the scales' gradient is that of LSQ (Esser et al., ICLR 2020).
    """
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="errata-", dir=scratch)))
        learner = _Learner(unet, calibration_set, scheme, dict(table), rounding, folder, cleanup)
        return learner.run(stage, report)


class _Learner:
    """One run of `learn_rounding`: the models, the inputs and the table as far as it is learned."""

    def __init__(
        self,
        unet: nn.Module,
        calibration_set: CalibrationSet,
        scheme: Scheme,
        table: dict[str, Tensor],
        rounding: LearnedRounding,
        folder: Path,
        cleanup: ExitStack,
    ) -> None:
        self._teacher = in_evaluation(unet)
        self._device = next(unet.parameters()).device
        self._context = StepContext()
        self._student = simulate(unet, scheme, table, self._context).requires_grad_(False)
        self._set = calibration_set
        self._evaluate = MixedSteps(calibration_set.timesteps)
        self._table = table
        self._rounding = rounding
        self._folder = folder
        self._cleanup = cleanup
        self._scheme = scheme

    def run(self, stage: Stage, report: BlockListener) -> dict[str, Tensor]:
        """Learn all blocks, and return the learned entries of the table."""
        blocks = self._blocks()
        learned: dict[str, Tensor] = {}
        for index, block in enumerate(blocks):
            made: list[bool] = []

            def make(block: Block = block, made: list[bool] = made) -> dict[str, Tensor]:
                made.append(True)
                return self._learn(block)

            updates = dict(stage(f"rounding.{block.name}", make))
            before, after, seconds = updates.pop(_FIGURES).tolist()
            self._install(block, updates)
            learned |= updates
            report(
                BlockReport(
                    name=block.name,
                    index=index,
                    total=len(blocks),
                    loss_before=before,
                    loss_after=after,
                    seconds=seconds,
                    is_resumed=not made,
                )
            )
        return learned

    @cached_property
    def _inputs(self) -> RowStore:
        """The denoiser inputs; read when the first block needs them, never if all are resumed."""
        count, seed = self._rounding.samples, seed_of(self._rounding.seed, "inputs")
        store = self._cleanup.enter_context(RowStore(self._folder / "inputs"))
        spill_inputs(self._set, store, count=count, seed=seed)
        return store

    def _blocks(self) -> list[Block]:
        """Return the blocks in the order in which a full pass runs them."""
        blocks = {block.name: block for block in blocks_of(self._teacher, self._scheme)}
        with RowStore(self._folder / "order") as one_row, torch.no_grad():
            spill_inputs(self._set, one_row, count=1, seed=0)
            batch = one_row.read([0])
            step = batch["step"].to(self._device)
            order = call_order(self._teacher, blocks, partial(self._evaluate, self._teacher, step, batch))
        for name in sorted(blocks.keys() - set(order)):
            _logger.warning("%s takes no part in a full pass: its weights stay rounded to nearest", name)
        return [blocks[name] for name in order]

    def _learn(self, block: Block) -> dict[str, Tensor]:
        """Return what a stage keeps of a block: entries of the table, and the figures of its report."""
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory(dir=self._folder) as folder,
            RowStore(Path(folder)) as store,
        ):
            data = capture_block(
                block,
                self._teacher,
                self._student,
                self._inputs,
                self._evaluate,
                self._context,
                store,
                batch_size=self._rounding.batch_size,
            )
            result = reconstruct(
                self._student.get_submodule(block.name),
                block,
                data,
                {layer.name: float_layer(self._teacher, layer.name).weight for layer in block.layers},
                self._table,
                self._rounding,
                self._context,
            )
        if not result.updates:
            _logger.info("%s keeps its initial rounding: learning did not lower its loss", block.name)
        figures = (result.loss_before, result.loss_after, time.perf_counter() - start)
        return {_FIGURES: torch.tensor(figures, dtype=torch.float64)} | result.updates

    @torch.no_grad()
    def _install(self, block: Block, updates: Mapping[str, Tensor]) -> None:
        """Take learned entries over into the table and the simulated model."""
        self._table |= updates
        module = self._student.get_submodule(block.name)
        for layer in block.layers:
            simulated = self._student.get_submodule(layer.name)
            assert isinstance(simulated, SimulatedLayer)
            simulated.take_codes(self._table, self._device)
        tensors = dict(module.named_buffers())
        for site, name in block.scales().items():
            tensors[name].copy_(self._table[f"{site}.scale"])
