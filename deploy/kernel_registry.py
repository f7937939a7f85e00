"""Kernels that run the layers and attentions of an artifact: which one is taken, and why.

Every kernel registers itself, with what it serves and the reasons not to use it. `choose` is the one place
that decides, and that makes the reasons of `DeployedPipeline.backend_report()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from errata.deploy.tensors import read_codes
from errata.errors import ArtifactError
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry
from errata.runtime.scheme import AttentionScheme, LayerScheme, layer_sites
from errata.runtime.step_context import StepContext

AUTO, REFERENCE = "auto", "reference"


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One line of `DeployedPipeline.backend_report()`."""

    layer: str
    kind: str
    scheme: str
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """A quantized layer that needs a kernel.

    Attributes:
        scheme: how it is quantized.
        module: the float layer, possibly on the meta device: shape and geometry, no numbers.
        tensors: of the artifact.
        context: tells the sampling step.
        device: where it is to run.
        backend: what `load` was asked for.
    """

    scheme: LayerScheme
    module: nn.Conv2d | nn.Linear
    tensors: Mapping[str, Tensor]
    context: StepContext
    device: torch.device
    backend: str

    @property
    def geometry(self) -> Geometry:
        """What the layer does besides its weight."""
        return Geometry(self.module)

    @property
    def weight_scale(self) -> Tensor:
        """Scales of the weight, float32, `(P, O)`."""
        return self.tensors[f"{self.scheme.name}.weight_scale"]

    @property
    def bias(self) -> Tensor | None:
        """Float32, `(O,)`, or None."""
        return self.tensors.get(f"{self.scheme.name}.bias")

    @property
    def bits(self) -> int | None:
        """Width of its input; None where that stays in floating point."""
        return self.scheme.activation_bits

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its activation quantizers, one for each part of the input."""
        return tuple(site.name for site in layer_sites(self.scheme))

    def codes(self) -> Tensor:
        """Return the codes of the weight, int8, unpacked."""
        return read_codes(self.scheme, self.tensors, self.module.weight.shape)


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """The matrix products of an attention, which need a kernel; attributes as in `LayerRequest`."""

    scheme: AttentionScheme
    tensors: Mapping[str, Tensor]
    context: StepContext
    device: torch.device
    backend: str

    @property
    def bits(self) -> int:
        """Width of its inputs."""
        return self.scheme.bits

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its quantizers: query, key, value and softmax output."""
        return self.scheme.sites


Request = TypeVar("Request", LayerRequest, AttentionRequest)
Built = TypeVar("Built", bound=nn.Module)


def _nothing(_: Any) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Kernel(Generic[Request, Built]):
    """A way to run layers, or attentions.

    `obstacle`, `refusal`, `drawback` and `reason` return a text, or "" if there is nothing to say.

    Attributes:
        name: in reports; also the value of `backend=` that asks for it, if `backends` has it.
        rank: of two kernels that can serve, the higher one is taken. Ours have 0 (reference) to 40 (cuda).
        build: makes what takes the place of the float layer, on the device.
        devices: types of device that it is made for; None is any.
        backends: values of `backend=` under which it is considered; None is any.
        bits: widths of the input that it serves; None among them is a float input.
        obstacle: why it cannot run on a device of those types.
        refusal: why it cannot compute this layer.
        drawback: why it would not be the fastest for this layer; counts with `backend="auto"` only.
        reason: what the report says where it is taken.
        finish: called once, when all layers are in place, with the network, the report and the context.
    """

    name: str
    rank: int
    build: Callable[[Request], Built]
    devices: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    bits: tuple[int | None, ...] = (8,)
    obstacle: Callable[[torch.device], str] = _nothing
    refusal: Callable[[Request], str] = _nothing
    drawback: Callable[[Request], str] = _nothing
    reason: Callable[[Request], str] = _nothing
    finish: Callable[[nn.Module, list[BackendRow], StepContext], None] | None = None

    def is_candidate(self, request: Request) -> bool:
        """Return whether it is made for such a layer, on such a device, under that backend."""
        return (
            (self.devices is None or request.device.type in self.devices)
            and (self.backends is None or request.backend in self.backends)
            and request.bits in self.bits
        )

    def why_not(self, request: Request) -> str:
        """Return why a candidate does not serve; empty where it does."""
        drawback = self.drawback(request) if request.backend == AUTO else ""
        return self.obstacle(request.device) or drawback or self.refusal(request)


LayerKernel = Kernel[LayerRequest, nn.Module]
AttentionKernel = Kernel[AttentionRequest, QuantizedAttention]
_LAYER_KERNELS: list[LayerKernel] = []
_ATTENTION_KERNELS: list[AttentionKernel] = []


def register_kernel(kernel: LayerKernel) -> LayerKernel:
    """Add a kernel for layers; return it.

    Raises:
        ValueError: there is one of that name for the same devices.
    """
    _add(kernel, _LAYER_KERNELS)
    return kernel


def register_attention_kernel(kernel: AttentionKernel) -> AttentionKernel:
    """Add a kernel for attentions; return it.

    Raises:
        ValueError: there is one of that name for the same devices.
    """
    _add(kernel, _ATTENTION_KERNELS)
    return kernel


def layer_kernels() -> tuple[LayerKernel, ...]:
    """Return all kernels for layers, the highest rank first."""
    return tuple(sorted(_LAYER_KERNELS, key=lambda kernel: -kernel.rank))


def choose_layer_kernel(request: LayerRequest) -> tuple[LayerKernel, str]:
    """Return the kernel that runs a layer, and why, see `choose`."""
    return choose(_LAYER_KERNELS, request)


def choose_attention_kernel(request: AttentionRequest) -> tuple[AttentionKernel, str]:
    """Return the kernel that runs an attention, and why, see `choose`."""
    return choose(_ATTENTION_KERNELS, request)


def choose(kernels: list[Kernel[Request, Built]], request: Request) -> tuple[Kernel[Request, Built], str]:
    """Return the first kernel that serves, and the reason that the report gives.

    The one that `backend=` names is asked first, then the others by rank.

    Raises:
        ArtifactError: none serves. The reference kernels serve everything, so they would have to be missing.
    """
    candidates = [kernel for kernel in kernels if kernel.is_candidate(request)]
    passed_over: dict[str, list[str]] = {}
    for kernel in sorted(candidates, key=lambda kernel: (kernel.name != request.backend, -kernel.rank)):
        if why_not := kernel.why_not(request):
            passed_over.setdefault(why_not, []).append(kernel.name)
            continue
        own = "requested" if kernel.name == request.backend else kernel.reason(request)
        return kernel, _reason(own, passed_over)
    raise ArtifactError(f"no kernel runs {request.scheme.name!r}: {_reason('', passed_over)}")


def backend_names() -> tuple[str, ...]:
    """Return the values that `backend=` may have."""
    named = [kernel.name for kernel in layer_kernels() if kernel.name in (kernel.backends or ())]
    return (AUTO, REFERENCE, *dict.fromkeys(named))


def check_backend(backend: str, device: torch.device) -> None:
    """Check that a backend is known and can run on a device.

    Raises:
        ArtifactError: with what is allowed.
    """
    if backend not in backend_names():
        raise ArtifactError(f"unknown backend {backend!r}; allowed are {', '.join(backend_names())}")
    if backend == AUTO or not (obstacle := _backend_obstacle(backend, device)):
        return
    *others, last = [AUTO, *(name for name in backend_names()[1:] if not _backend_obstacle(name, device))]
    raise ArtifactError(
        f"backend {backend!r} cannot run: {obstacle}; use backend={', '.join(map(repr, others))} or {last!r}"
    )


def _backend_obstacle(backend: str, device: torch.device) -> str:
    named = [kernel for kernel in _LAYER_KERNELS if kernel.name == backend]
    fitting = [kernel for kernel in named if kernel.devices is None or device.type in kernel.devices]
    if not fitting:
        made_for = sorted({kind for kernel in named for kind in kernel.devices or ()})
        return f"it is made for {' and '.join(made_for)}, and the device is {device.type}"
    obstacles = [kernel.obstacle(device) for kernel in fitting]
    return "" if "" in obstacles else obstacles[0]


def _add(kernel: Kernel[Request, Built], kernels: list[Kernel[Request, Built]]) -> None:
    if any((other.name, other.devices) == (kernel.name, kernel.devices) for other in kernels):
        raise ValueError(
            f"there is a kernel {kernel.name!r} for {kernel.devices or 'any device'}; choose another name"
        )
    kernels.append(kernel)


def _reason(own: str, passed_over: Mapping[str, list[str]]) -> str:
    if not own and len(passed_over) == 1:
        return next(iter(passed_over))
    others = [f"not {' or '.join(names)}: {why}" for why, names in passed_over.items()]
    return "; ".join([own, *others] if own else others) or "no other kernel is made for it"
