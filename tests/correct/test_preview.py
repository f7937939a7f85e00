import pytest
import torch

from errata.correct.preview import on_host


def test_a_timestep_on_an_accelerator_is_not_read_back() -> None:
    """A meta tensor has no value to read, so reading it would fail."""
    elsewhere = torch.tensor(7, device="meta")
    known = on_host(elsewhere, 7.0)
    assert known.device.type == "cpu"
    assert known.dtype == torch.int64
    assert known.item() == 7
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_host(elsewhere, None)


@pytest.mark.parametrize("timestep", [7, torch.tensor(7)])
def test_a_timestep_in_main_memory_stays_as_it_is(timestep: object) -> None:
    assert on_host(timestep, 3.0) is timestep
