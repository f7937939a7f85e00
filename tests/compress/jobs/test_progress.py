import logging

import pytest
import torch
from torch import Tensor

from errata.compress.jobs.progress import BlockProgress, BlockReport, StepProgress
from errata.durations import duration, time_left


def block(index: int, *, is_resumed: bool, total: int = 3) -> BlockReport:
    return BlockReport(
        name=f"block.{index}", index=index, total=total, loss_before=0.5, loss_after=0.0125,
        seconds=30.0, is_resumed=is_resumed,
    )  # fmt: skip


def test_blocks_are_told_with_losses_and_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    heard: list[BlockReport] = []
    lines = BlockProgress("learned rounding", lambda name, make: dict(make()), heard.append)
    lines.report(block(0, is_resumed=True))
    made = {"x": torch.ones(1)}
    assert lines.stage("next", lambda: made) == made
    lines.report(block(1, is_resumed=False))
    lines.stage("last", lambda: made)
    lines.report(block(2, is_resumed=False))
    assert caplog.messages == [
        "resuming: 1 of 3 blocks are done (learned rounding)",
        "learned rounding: block 2 of 3, block.1: loss 0.5 before, 0.0125 after, 30 s; about 30 s left",
        "learned rounding: block 3 of 3, block.2: loss 0.5 before, 0.0125 after, 30 s",
    ]
    assert [report.phase for report in heard] == ["learned rounding"] * 3
    assert [report.is_resumed for report in heard] == [True, False, False]


def test_that_all_blocks_are_done_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def finished(name: str, make: object) -> dict[str, Tensor]:
        return {}

    lines = BlockProgress("bias correction", finished, None)
    for index in range(2):
        lines.stage(str(index), dict)
        lines.report(block(index, is_resumed=True, total=2))
    assert caplog.messages == ["resuming: 2 of 2 blocks are done (bias correction)"]


def test_steps_are_told_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    context = iter([0, 5, 15, 30, 45, 60])
    monkeypatch.setattr("errata.compress.jobs.progress.time.monotonic", lambda: float(next(context)))
    lines = StepProgress("activation ranges", 5)
    lines.update(1, is_resumed=True)
    for done in range(2, 6):
        lines.update(done, is_resumed=False)
    assert caplog.messages == ["activation ranges: 3 of 5 steps; about 25 s left"]


def test_times_for_people() -> None:
    assert [duration(seconds) for seconds in (4.24, 35.2, 720, 12600)] == ["4.2 s", "35 s", "12 min", "3.5 h"]
    assert time_left(2, 4, 30) == "about 60 s left"
