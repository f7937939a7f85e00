"""A recorder keeps what a denoiser was called with, whatever the way of calling."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata import CalibrationError
from errata.calibration.recorder import Recorder


class Doubler(nn.Module):
    """A denoiser that needs no weights."""

    def forward(
        self, sample: Tensor, timestep: Any, words: Tensor | None = None, *, return_dict: bool = True
    ) -> Tensor:
        return 2 * sample


X = torch.arange(6.0).reshape(2, 1, 1, 3)


def test_every_way_of_calling_is_recorded_alike() -> None:
    denoiser = Doubler()
    with Recorder(denoiser) as recorder:
        denoiser(X, torch.tensor(7))
        denoiser(X + 1, timestep=torch.tensor([6, 6]), return_dict=False)
        denoiser(timestep=5, sample=X + 2)
    denoiser(X, 0)  # after the recording
    trajectory = recorder.trajectory()
    assert (trajectory.num_calls, trajectory.num_rows) == (3, 2)
    assert torch.equal(trajectory.sample, torch.stack([X, X + 1, X + 2]))
    assert trajectory.timestep.tolist() == [7, 6, 5]
    assert trajectory.timestep.dtype == torch.int64
    assert trajectory.cond == {}
    assert not denoiser._forward_pre_hooks


def test_a_record_is_a_copy() -> None:
    denoiser, x, words = Doubler(), X.clone(), X.clone()
    with Recorder(denoiser) as recorder:
        denoiser(x, 1, words)
        x += 1  # as a sampler that works in place does
        words += 1
        denoiser(x, 0, words)
    trajectory = recorder.trajectory()
    assert torch.equal(trajectory.sample, torch.stack([X, X + 1]))
    assert torch.equal(trajectory.cond["words"], torch.stack([X, X + 1]))


def test_a_constant_argument_is_kept_once() -> None:
    denoiser = Doubler()
    with Recorder(denoiser) as recorder:
        for _ in range(3):
            denoiser(X, 0, X.clone())
    assert torch.equal(recorder.trajectory().cond["words"], X[None])


def test_fractional_timesteps_keep_every_digit() -> None:
    denoiser = Doubler()
    with Recorder(denoiser) as recorder:
        denoiser(X, 0.1)
        denoiser(X, 1 / 3)
    assert recorder.trajectory().timestep.tolist() == [0.1, 1 / 3]


def test_the_hook_is_removed_after_an_error() -> None:
    denoiser = Doubler()
    with pytest.raises(ZeroDivisionError), Recorder(denoiser):
        raise ZeroDivisionError
    assert not denoiser._forward_pre_hooks


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            (X, 1),
            (X[:1], 0),
            r"`sample` changed within a trajectory: call 0 got float32\[2, 1, 1, 3\], call 1",
        ),
        ((X, 1), (X.half(), 0), r"`sample` changed .* call 1 got float16\[2"),
        ((X, 1, X), (X, 0), r"`words` changed .* call 1 got none"),
        ((X, 1), (X, 0, X), r"`words` changed .* call 0 got none, call 1 got float32\[2"),
        ((X, 1), (X, 0.5), r"`timestep` changed .* call 0 got int64\[\], call 1 got float64"),
        ((X, 1), (X, torch.tensor([1, 0])), r"`timestep` is \[1, 0\]; all rows of a call must share one"),
    ],
)
def test_calls_that_do_not_fit_are_refused(first: tuple[Any], second: tuple[Any], message: str) -> None:
    denoiser = Doubler()
    with Recorder(denoiser):
        denoiser(*first)
        with pytest.raises(CalibrationError, match=message):
            denoiser(*second)


def test_what_is_no_denoiser_is_refused() -> None:
    with pytest.raises(CalibrationError, match="a Linear, whose forward takes no `sample`, `timestep`"):
        Recorder(nn.Linear(1, 1))
    with pytest.raises(CalibrationError, match=r"the pipeline never called its unet \(Doubler\)"):
        Recorder(Doubler()).trajectory()
