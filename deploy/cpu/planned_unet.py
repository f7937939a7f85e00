"""A network on the CPU whose calls are recorded once for a shape, and run as native programs from then on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from errata.deploy.cpu.fusion import FusedResnet, embedding_of
from errata.deploy.cpu.program import Program
from errata.deploy.cpu.recording import Recorder
from errata.runtime.replayed_unet import Answer, Inputs, ReplayedUNet, Signature, signature_of
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

_MOST_PROGRAMS = 8
_MEBIBYTE = 1 << 20


class PlannedUNet(ReplayedUNet):
    """A `BranchedUNet` that records the second call of a shape and runs the others as programs.

    A program serves all steps. Its results are those of the network itself, to the bit. Where a module has a
    hook or was replaced since, where rows belong to several steps, under a profiler, and where something
    computes that no program can have, calls are made layer by layer; `plan` tells why.

    Args:
        branched: the network, on the CPU, with its fused blocks.
        context: tells the step.
    """

    def __init__(self, branched: BranchedUNet, context: StepContext) -> None:
        super().__init__(branched.unet)
        self._context = context
        self._programs = _Programs()

    @property
    def runs_programs(self) -> bool:
        """Whether calls of any shape run as programs now."""
        return self._programs.are_used

    def plan(self) -> str:
        """Return whether the calls so far run as programs or layer by layer, and why."""
        return self._programs.described()

    def replayed(self, kind: tuple[str, int], inputs: Inputs, call: Callable[[Inputs], Answer]) -> Answer:
        """See `ReplayedUNet.replayed`."""
        step, time = self._context.declared_step, self._context.time
        if not isinstance(step, int) or time is None or _is_watched():
            return call(inputs)
        signature = signature_of(kind, inputs)
        program = self._programs.get(self.unet, signature)
        if program is None:
            return call(inputs)
        if isinstance(program, Recording):
            return self._recorded(signature, inputs, call)
        if not program.knows(step, time):
            self._prepare(time)
        found = iter(program.run(list(inputs.values()), step, time))
        return tuple(next(found, None) for _ in range(2 if kind[0] == "full" else 1))

    def _recorded(self, signature: Signature, inputs: Inputs, call: Callable[[Inputs], Answer]) -> Answer:
        step, time = self._context.declared_step, self._context.time
        assert isinstance(step, int)
        assert time is not None
        # What is made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            own = {name: x.clone() for name, x in inputs.items()}
            with Recorder(own.values(), changing=self._context.shown) as recorder:
                self._context.on_read = lambda: recorder.refuse("a layer reads the number of the step")
                try:
                    answer = call(own)
                finally:
                    self._context.on_read = None
            outputs = [x for x in answer if x is not None]
            if not all(map(recorder.arena.has, outputs)):
                recorder.refuse("torch computes what the network returns")
            if not recorder.obstacle and not self._agrees(time):
                recorder.refuse("the network adds something to its time embedding")
            if recorder.obstacle:
                self._programs.refuse(signature, recorder.obstacle)
                return answer
            program = Program(recorder, list(own.values()), outputs)
            found = program.run(list(own.values()), step, time)
        if not all(map(_is_same, outputs, found)):
            self._programs.refuse(signature, "a program gave another result")
            return answer
        self._programs.keep(signature, program)
        copies = iter(found)  # the next run writes to where the answer is
        return tuple(None if x is None else next(copies) for x in answer)

    def _agrees(self, time: float) -> bool:
        """Return whether the biases in use are those that follow from a time."""
        embedding = embedding_of(self.unet, time)
        return all(
            block.is_prepared(embedding, time) for block in self.modules() if isinstance(block, FusedResnet)
        )

    def _prepare(self, time: float) -> None:
        """Keep the biases that follow from a time."""
        embedding = embedding_of(self.unet, time)
        for block in self.modules():
            if isinstance(block, FusedResnet):
                block.prepare(embedding, time)


class Recording:
    """Stands for a program that the call under way is to make."""


class _Programs:
    """The programs of a network by what they were recorded for; copies of a network begin without any."""

    def __init__(self) -> None:
        # None: called once. A text: why there is none.
        self._known: OrderedDict[Signature, Program | str | None] = OrderedDict()
        self._network: nn.Module | None = None
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        self._tensors: list[tuple[Mapping[str, Tensor | None], str, Tensor, int]] = []
        self._obstacle = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Programs:
        """Return an empty collection: a program has the addresses of one network."""
        return _Programs()

    def get(self, network: nn.Module, signature: Signature) -> Program | Recording | None:
        """Return the program of a call; None where the call is to be made layer by layer."""
        if network is not self._network or not self._is_unchanged():
            self._look_at(network)
        self._obstacle = _obstacle(module for module, _ in self._modules)
        if self._obstacle:
            return None
        if signature not in self._known:
            self.refuse(signature, None)
            return None
        self._known.move_to_end(signature)
        known = self._known[signature]
        if known is None:
            return Recording()
        return known if isinstance(known, Program) else None

    def keep(self, signature: Signature, program: Program) -> None:
        """Keep a program, and forget the one that was not used for the longest time if there are many."""
        self._known[signature] = program
        self._limit()

    def refuse(self, signature: Signature, reason: str | None) -> None:
        """Note why there is none; None if that is not known yet."""
        self._known[signature] = reason
        self._limit()

    @property
    def are_used(self) -> bool:
        """Whether there are any, and nothing is in their way."""
        return not self._obstacle and bool(self._made)

    @property
    def _made(self) -> list[Program]:
        return [known for known in self._known.values() if isinstance(known, Program)]

    def described(self) -> str:
        """Return how calls are made, and why."""
        if self._obstacle:
            return f"layer by layer: {self._obstacle}"
        programs = self._made
        reasons = dict.fromkeys(known for known in self._known.values() if isinstance(known, str))
        if not programs:
            return f"layer by layer: {'; '.join(reasons) or 'no shape was called twice yet'}"
        counts = ", ".join(str(len(program)) for program in programs)
        memory = sum(program.memory for program in programs) / _MEBIBYTE
        others = f"; other calls layer by layer: {'; '.join(reasons)}" if reasons else ""
        return f"native programs of {counts} operations, {memory:.1f} MiB for activations{others}"

    def _limit(self) -> None:
        while len(self._known) > _MOST_PROGRAMS:
            self._known.popitem(last=False)

    def _look_at(self, network: nn.Module) -> None:
        """Forget all programs, and remember what the network is made of."""
        self._known.clear()
        self._network = network
        self._modules = [(module, dict(module._modules)) for module in network.modules()]
        self._tensors = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in network.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def _is_unchanged(self) -> bool:
        return all(module._modules == parts for module, parts in self._modules) and all(
            tensors.get(name) is tensor and tensor.data_ptr() == place
            for tensors, name, tensor, place in self._tensors
        )


def _obstacle(modules: Iterable[nn.Module]) -> str:
    """Return why the modules have to be called one by one; empty if they need not."""
    if _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks:
        return "there is a hook for all modules"
    for module in modules:
        # accelerate puts a forward of its own there.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return "a module has a hook"
        if module._compiled_call_impl is not None:
            return "a module was compiled"
    return ""


def _is_watched() -> bool:
    """Return whether something looks at the operators of torch, or changes them."""
    return torch._C._autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0


def _is_same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))
