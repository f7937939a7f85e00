"""Which kernel a layer gets, and what the report says of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from errata import deploy
from errata.deploy import assembly, kernel_registry, reference
from errata.deploy.cpu import int8, kernels, native
from errata.deploy.cuda import installing
from errata.deploy.kernel_registry import (
    AttentionRequest,
    LayerKernel,
    LayerRequest,
    backend_names,
    check_backend,
    choose_attention_kernel,
    choose_layer_kernel,
    register_kernel,
)
from errata.errors import ArtifactError
from errata.runtime.scheme import AttentionScheme, LayerScheme
from errata.runtime.step_context import StepContext

Artifact = Callable[[str], Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is for that test alone; the CPU has all instructions and a compiler."""
    monkeypatch.setattr(kernel_registry, "_LAYER_KERNELS", list(kernel_registry._LAYER_KERNELS))
    monkeypatch.setattr(int8, "is_available", lambda: True)
    monkeypatch.setattr(int8, "has_onednn", lambda: True)
    monkeypatch.setattr(native, "product_obstacle", lambda: "")


def request_for(
    *,
    device: torch.device = CPU,
    backend: str = "auto",
    inputs: int = 32,
    outputs: int = 32,
    bits: int = 8,
    activation_bits: int | None = 8,
    kernel: int = 3,
) -> LayerRequest:
    with torch.device("meta"):
        module = nn.Conv2d(inputs, outputs, kernel, padding=1)
    scheme = LayerScheme(
        name="layer", kind="conv2d", weight_bits=bits, activation_bits=activation_bits, input_widths=(inputs,)
    )
    return LayerRequest(
        scheme=scheme, module=module, tensors={}, context=StepContext(), device=device, backend=backend
    )


def chosen(request: LayerRequest) -> tuple[str, str]:
    kernel, reason = choose_layer_kernel(request)
    return kernel.name, reason


@pytest.mark.parametrize(
    ("request_", "backend", "reason"),
    [
        (request_for(), "vnni", "int8 kernel available"),
        (request_for(bits=6), "vnni", "int6 weights are unpacked to int8 at load"),
        (request_for(bits=4), "vnni", "int4 weights are unpacked to int8 at load"),
        (request_for(inputs=1), "vnni", "int8 kernel available"),
        (request_for(outputs=1), "vnni", "int8 kernel available"),
        (
            request_for(inputs=33),
            "onednn",
            "int8 kernel available; not vnni: 33 channels are not a multiple of 4",
        ),
        (
            request_for(inputs=33, outputs=1),
            "reference",
            "not vnni: 33 channels are not a multiple of 4; not onednn: too few channels for int8 to be "
            "faster: 1, and it needs 16",
        ),
        (request_for(inputs=1, backend="onednn"), "onednn", "requested"),
        (
            request_for(inputs=33, backend="vnni"),
            "onednn",
            "int8 kernel available; not vnni: 33 channels are not a multiple of 4",
        ),
        (
            request_for(kernel=9),
            "onednn",
            "int8 kernel available; not vnni: its convolution kernel has 81 pixels; at most 64 are supported",
        ),
        (
            request_for(activation_bits=None),
            "weight only",
            "the scheme keeps this input in floating point; codes dequantized at each call",
        ),
        (
            request_for(activation_bits=None, backend="vnni"),
            "weight only",
            "the scheme keeps this input in floating point; codes dequantized at each call",
        ),
        (request_for(activation_bits=None, backend="reference"), "reference", "requested"),
        (request_for(backend="reference"), "reference", "requested"),
        (request_for(device=CUDA), "cuda", installing.UNCHOSEN),
        (
            request_for(device=CUDA, activation_bits=None),
            "reference",
            "the scheme keeps this input in floating point",
        ),
    ],
)
def test_our_kernels(request_: LayerRequest, backend: str, reason: str) -> None:
    assert chosen(request_) == (backend, reason)


def test_a_machine_without_instructions_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "is_available", lambda: False)
    told = ("reference", "this CPU has no VNNI instructions: int8 products would saturate")
    assert chosen(request_for()) == told


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "product_obstacle", lambda: "no C compiler")
    assert chosen(request_for()) == ("onednn", "int8 kernel available; not vnni: no C compiler")
    with pytest.raises(ArtifactError, match="'vnni' cannot run: no C compiler; use backend='auto', 'ref"):
        check_backend("vnni", CPU)


@pytest.mark.parametrize(
    ("device", "backend", "name"),
    [
        (CPU, "auto", "fused float"),
        (CPU, "vnni", "float"),
        (CPU, "onednn", "float"),
        (CPU, "reference", "reference"),
        (CPU, "triton", "reference"),
        (CUDA, "auto", "fused float"),
        (CUDA, "triton", "reference"),
    ],
)
def test_attentions(device: torch.device, backend: str, name: str) -> None:
    request = AttentionRequest(
        scheme=AttentionScheme(name="attention", bits=8),
        tensors={},
        context=StepContext(),
        device=device,
        backend=backend,
    )
    kernel, reason = choose_attention_kernel(request)
    assert kernel.name == name
    if backend == "auto":
        assert "stay" in reason
        assert "more precise than the scheme" in reason
        assert kernel is (kernels.FUSED_ATTENTION if device == CPU else installing.CUDA_ATTENTION)


def test_backends_are_the_kernels_that_may_be_asked_for() -> None:
    assert len(assembly.OUR_KERNELS) == 3
    assert backend_names() == ("auto", "reference", "vnni", "onednn", "triton")
    for name in ("auto", "reference", "vnni", "onednn"):
        check_backend(name, CPU)
    with pytest.raises(ArtifactError, match="unknown backend 'weight only'; allowed are auto, reference"):
        check_backend("weight only", CPU)
    with pytest.raises(
        ArtifactError, match="'onednn' cannot run: it is made for cpu, and the device is mps; use backend='a"
    ):
        check_backend("onednn", torch.device("mps"))


def mine(**changes: object) -> LayerKernel:
    kernel = LayerKernel(
        name="mine",
        rank=30,
        devices=("cpu",),
        backends=("auto", "mine"),
        refusal=lambda request: "" if request.module.weight.shape[0] == 32 else "it serves 32 outputs",
        reason=lambda request: "one of mine",
        build=reference.REFERENCE.build,
    )
    return dataclasses.replace(kernel, **changes)  # type: ignore[arg-type]


def test_a_kernel_of_ones_own() -> None:
    register_kernel(mine())
    assert backend_names() == ("auto", "reference", "mine", "vnni", "onednn", "triton")
    assert chosen(request_for()) == ("mine", "one of mine")
    assert chosen(request_for(backend="mine")) == ("mine", "requested")
    assert chosen(request_for(backend="vnni")) == ("vnni", "requested")
    assert chosen(request_for(outputs=16)) == (
        "vnni",
        "int8 kernel available; not mine: it serves 32 outputs",
    )
    assert chosen(request_for(outputs=16, backend="mine")) == ("reference", "it serves 32 outputs")
    with pytest.raises(ValueError, match="there is a kernel 'mine' for .*cpu.*; choose another name"):
        register_kernel(mine(rank=1))


def test_a_drawback_counts_for_auto_alone() -> None:
    register_kernel(mine(drawback=lambda request: "it is slow"))
    assert chosen(request_for()) == ("vnni", "int8 kernel available; not mine: it is slow")
    assert chosen(request_for(backend="mine")) == ("mine", "requested")


def test_a_kernel_of_ones_own_runs_an_artifact(tiny_artifact: Artifact) -> None:
    finished: list[int] = []
    register_kernel(mine(refusal=lambda request: "", finish=lambda unet, rows, _: finished.append(len(rows))))
    deployed = deploy.load(tiny_artifact("w8a8"), device="cpu", backend="mine")
    rows = deployed.backend_report()
    assert {row.backend for row in rows if row.scheme == "w8a8"} == {"mine"}
    assert finished == [len(rows)]
    plain = deploy.load(tiny_artifact("w8a8"), device="cpu", backend="reference")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(deployed.denoiser.full(x, 3, {})[0], plain.denoiser.full(x, 3, {})[0])
