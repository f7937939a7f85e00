"""How an artifact's layers get onto these kernels, and what the report says of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata import deploy
from errata.calibration import CalibrationSet
from errata.deploy import assembly, cuda, kernel_registry
from errata.deploy.cuda import CudaLayer, graphs, installing
from errata.deploy.cuda.candidates import INT_MM
from errata.deploy.cuda.selection import Fixed
from errata.errors import ArtifactError
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

# A test may replace the list of kernels: errata's own have to be in it by then.
assert assembly.OUR_KERNELS

Artifact = Callable[[str], Path]


class EverSlower:
    """The first way that is prepared is the fastest."""

    prepared = 0

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        EverSlower.prepared += 1
        seconds = EverSlower.prepared / 1000
        return lambda: seconds


@pytest.fixture
def without_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Takes the CPU for a CUDA device without triton, where layers choose among what plain torch has."""
    on_cpu = dataclasses.replace(installing.CUDA, devices=("cpu",))
    others = [kernel for kernel in kernel_registry.layer_kernels() if kernel is not installing.CUDA]
    monkeypatch.setattr(kernel_registry, "_LAYER_KERNELS", [on_cpu, *others])
    monkeypatch.setattr(installing, "triton_obstacle", lambda device: "none here")
    monkeypatch.setattr(installing, "CudaTimer", EverSlower)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("without_device")
def test_auto_chooses_at_the_first_call_and_reports_every_time(
    tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    path = tiny_artifact("w8a8")
    reference, fastest = (deploy.load(path, device="cpu", backend=name) for name in ("reference", "auto"))
    before = {row.layer: row for row in fastest.backend_report() if row.scheme == "w8a8"}
    assert {(row.backend, row.reason) for row in before.values()} == {("cuda", cuda.UNCHOSEN)}
    x = next(tiny_calibration.batches(2)).sample
    found, expected = (deployed.denoiser.full(x, 2, {})[0] for deployed in (fastest, reference))
    # Not closer: layers in half precision are without the noise of an 8-bit input, which the reference has.
    assert (found - expected).square().mean().sqrt() <= 0.05 * expected.square().mean().sqrt()
    after = {row.layer: row for row in fastest.backend_report() if row.layer in before}
    assert {row.backend for row in after.values()} == {INT_MM, "half bfloat16"}
    row = after["down_blocks.0.resnets.0.conv1"]
    assert row.backend == INT_MM
    assert row.reason.startswith("fastest at each shape; 4x16x8x8 float32: _int_mm ")
    assert ", half bfloat16 " in row.reason
    assert "half precision reads its input unquantized" in after["conv_in"].reason
    fastest.denoiser.full(x[:1], 2, {})
    again = {row.layer: row.reason for row in fastest.backend_report()}["down_blocks.0.resnets.0.conv1"]
    assert again.startswith(row.reason)
    assert "; 1x16x8x8 float32: " in again


@pytest.mark.usefixtures("without_device")
def test_what_was_measured_is_not_measured_again(tiny_artifact: Artifact) -> None:
    def run() -> list[str]:
        deployed = deploy.load(tiny_artifact("w4a8"), device="cpu")
        deployed.denoiser.full(torch.ones(2, 1, 8, 8), 0, {})
        return [row.reason for row in deployed.backend_report()]

    first, measured = run(), EverSlower.prepared
    assert run() == first
    assert EverSlower.prepared == measured


@pytest.mark.usefixtures("without_device")
def test_corrected_layers_follow_their_choice(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8+cachequant-2"), device="cpu")
    _, feature = deployed.denoiser.full(torch.ones(2, 1, 8, 8), 0, {})
    assert feature is not None
    deployed.denoiser.cached(torch.ones(2, 1, 8, 8), 1, {}, feature)
    rows = [row for row in deployed.backend_report() if "output corrected" in row.reason]
    assert rows
    assert all("fastest at each shape; " in row.reason for row in rows)


def test_what_cannot_run_is_said(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tiny_artifact("w8a8")
    with pytest.raises(ArtifactError, match="allowed are auto, reference, vnni, onednn, triton"):
        deploy.load(path, backend="cudnn")
    monkeypatch.setattr(installing, "_has_triton", lambda: True)
    with pytest.raises(ArtifactError, match="'triton' cannot run: Triton's kernels need a CUDA device"):
        deploy.load(path, device="cpu", backend="triton")
    monkeypatch.setattr(installing, "_has_triton", lambda: False)
    with pytest.raises(
        ArtifactError, match="'triton' cannot run: triton is not installed.*use backend='auto'"
    ):
        deploy.load(path, device="cpu", backend="triton")


def test_old_devices_and_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    monkeypatch.setattr(installing, "_has_triton", lambda: True)
    monkeypatch.setattr(installing, "_triton_version", lambda: "3.9.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert installing.triton_obstacle(device) == "this device has compute capability 7.5; int8 tiles need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert installing.triton_obstacle(device) == ""
    monkeypatch.setattr(installing, "_triton_version", lambda: "2.3.1+git")
    assert installing.triton_obstacle(device) == "triton 2.3.1+git is installed, 3.0 is needed"


def test_a_layer_that_no_kernel_computes_is_refused() -> None:
    module = nn.Conv2d(8, 8, 3, padding="same")
    scheme = LayerScheme(name="odd", kind="conv2d", weight_bits=8, activation_bits=8, input_widths=(8,))
    tensors = {
        "odd.weight_scale": torch.ones(1, 8),
        "odd.input.0.scale": torch.ones(2),
        "odd.input.0.zero_point": torch.zeros(2, dtype=torch.uint8),
    }
    request = kernel_registry.LayerRequest(
        scheme=scheme,
        module=module,
        tensors={**tensors, "odd.codes": torch.zeros(8, 8, 3, 3, dtype=torch.int8)},
        context=StepContext(),
        device=torch.device("cpu"),
        backend="triton",
    )
    with pytest.raises(
        ArtifactError, match="no int8 kernel for layer 'odd': padding='same' is not supported"
    ):
        cuda.runtime_layer(request)


class Replay:
    """Stands for a CUDA graph on a CPU: runs the recorded call on its own inputs, into its own outputs."""

    def __init__(
        self, call: Callable[[], tuple[Tensor | None, ...]], outputs: tuple[Tensor | None, ...]
    ) -> None:
        self._call = call
        self._outputs = outputs

    def replay(self) -> None:
        for own, made in zip(self._outputs, self._call(), strict=True):
            if own is not None and made is not None:
                own.copy_(made)


@pytest.mark.usefixtures("without_device")
def test_a_recorded_network_replays_every_step(
    tiny_artifact: Artifact, tiny_calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[object] = []

    def capture(
        inputs: dict[str, Tensor], call: Callable[..., tuple[Tensor | None, ...]]
    ) -> graphs._Captured:
        own = {name: value.clone() for name, value in inputs.items()}

        def run() -> tuple[Tensor | None, ...]:
            return call(own)

        outputs = tuple(value if value is None else value.clone() for value in run())
        captures.append(run)
        return graphs._Captured(Replay(run, outputs), own, outputs)  # type: ignore[arg-type]

    plain, recorded = (deploy.load(tiny_artifact("w8a8+deepcache-3"), device="cpu") for _ in range(2))
    x = next(tiny_calibration.batches(0)).sample
    recorded.denoiser.full(x, 0, {})
    recorded.pipe.unet.denoiser._unet = cuda.GraphedUNet(recorded.pipe.unet.denoiser._unet)
    with pytest.raises(ValueError, match="CUDA graphs need a network on a CUDA device, this one is on cpu"):
        recorded.denoiser.full(x, 0, {})
    monkeypatch.setattr(graphs, "_capture", capture)
    recorded.pipe.unet._denoiser.reuses_outputs = True
    answers = []
    for step in (0, 3, 5, 0):
        sample = next(tiny_calibration.batches(step)).sample
        found, feature = recorded.denoiser.full(sample, step, {})
        expected, expected_feature = plain.denoiser.full(sample, step, {})
        assert feature is not None
        assert expected_feature is not None
        assert torch.equal(found, expected)
        assert torch.equal(feature, expected_feature)
        later = recorded.denoiser.cached(sample, 4, {}, feature)
        assert torch.equal(later, plain.denoiser.cached(sample, 4, {}, expected_feature))
        answers.append(found)
    assert len(captures) == 2  # one for each kind of call
    assert torch.equal(answers[0], answers[3])  # copies: no replay wrote over them
    recorded.denoiser.full(x[:1], 0, {})
    assert len(captures) == 3


def test_layers_of_an_artifact_move_with_it(make_case: Callable[..., Any]) -> None:
    layer = make_case(nn.Linear(16, 8), (16,), Fixed(INT_MM)).layer
    assert isinstance(layer, CudaLayer)
    moved = layer.to("meta")
    assert {value.device.type for value in moved.buffers()} == {"meta"}
