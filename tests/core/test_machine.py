import sys
import types
from pathlib import Path

import pytest
import torch
from forked import ForkServer

from errata import machine
from errata.machine import metered

# In a process of its own: in this one, the allocator may have kept what other tests freed.
READINGS = """
import torch
from errata.machine import metered
for size in (10, 60_000_000, 10):
    with metered(torch.device("cpu")) as reading:
        torch.ones(size, dtype=torch.uint8).sum()
    print(reading.peak_bytes, reading.joules)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_what_happens_inside_is_seen(forked: ForkServer) -> None:
    ended = forked.run(READINGS)
    assert ended.returncode == 0, ended.stderr
    readings = [line.split() for line in ended.stdout.splitlines()]
    (small, large, after), joules = zip(*readings, strict=True)
    assert int(large) - int(small) > 50e6
    assert int(after) < int(large) - 40e6
    assert joules == ("None",) * 3


def test_without_proc_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(machine, "_CLEAR", Path("/nowhere/clear"))
    with metered(torch.device("cpu")) as reading:
        pass
    assert reading.peak_bytes is None


def test_energy_is_the_difference_of_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for NVML and for the device, since neither is everywhere."""
    counters = iter([5_000, 9_500])
    nvml = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counters),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    with metered(torch.device("cuda")) as reading:
        pass
    assert reading.joules == pytest.approx(4.5)
    assert reading.peak_bytes == 123


def test_a_device_that_counts_no_energy_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    with metered(torch.device("cuda")) as reading:
        pass
    assert reading.joules is None
