"""A float pipeline is checked, and run undisturbed."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from errata.calibration.opening import in_one_line
from errata.errors import CalibrationError

__all__ = ["check_pipeline", "run_batch", "untouched"]

# Set for every sample-batch by `calibrate`, so not to be given in `inputs`.
_RESERVED = ("generator", "num_inference_steps", "return_dict")


def check_pipeline(
    pipe: DiffusionPipeline, *, has_prompts: bool, has_inputs: bool, guidance_scale: float | None
) -> None:
    """Refuse a pipeline that cannot be run as asked, before anything is written.

    Raises:
        CalibrationError: no UNet, no seeds, nothing that takes the prompts, inputs or guidance, or adapters
            that are not part of the weights yet.
    """
    name = type(pipe).__name__
    if not isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        raise CalibrationError(f"`pipe` is a {name}, which has no unet; choose a pipeline with one")
    if getattr(pipe, "scheduler", None) is None:
        raise CalibrationError(f"`pipe` is a {name}, which has no scheduler to record; give it one")
    _check_no_adapters(pipe)
    needed = {
        "generator": True,
        "num_inference_steps": True,
        "prompt": has_prompts,
        "guidance_scale": guidance_scale is not None,
    }
    for argument, is_needed in needed.items():
        if is_needed and not _takes(pipe, argument):
            raise CalibrationError(
                f"{name} does not take `{argument}`; leave it out, or use a pipeline that does"
            )
    if not (has_prompts or has_inputs or "batch_size" in _parameters(pipe)):
        raise CalibrationError(
            f"{name} does not take `batch_size`: it needs `prompts` or `inputs` to know what to draw; give "
            "them (`errata calibrate --prompts`)"
        )


def _check_no_adapters(pipe: DiffusionPipeline) -> None:
    """Check that no adapter lies beside a weight: the later stages would ignore it or keep it in float."""
    for component, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, part in module.named_modules():
            has_adapter = isinstance(getattr(part, "base_layer", None), torch.nn.Module)
            if has_adapter or any("lora_" in key for key, _ in part.named_parameters(recurse=False)):
                raise CalibrationError(
                    f"`{component}.{name}` has LoRA layers next to its weight; fuse them first: "
                    "`pipe.fuse_lora(); pipe.unload_lora_weights()`"
                )


def run_batch(
    pipe: DiffusionPipeline,
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float | None,
    prompts: Sequence[str] | None,
    inputs: Mapping[str, Any] | None,
    call: Callable[..., Any] | None = None,
    output_type: str | None = None,
) -> Any:
    """Run the pipeline once, one sample per seed, and return what it returns.

    It starts from a fresh copy of its scheduler. `call` is called in its place, with the same arguments;
    `output_type` None is the one that takes the least work.

    Raises:
        CalibrationError: `inputs` collides with other arguments, or the pipeline refuses its arguments.
    """
    given = dict(inputs or {}) | ({} if output_type is None else {"output_type": output_type})
    arguments = _call_arguments(pipe, seeds, num_inference_steps, guidance_scale, prompts, given)
    scheduler = pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seeds[0])  # for samplers that draw noise without asking for a generator
            result = (call or pipe)(**arguments)
    except (TypeError, ValueError) as problem:
        raise CalibrationError(
            f"{type(pipe).__name__} refused its arguments: {in_one_line(problem)}; give it others"
        ) from problem
    finally:
        pipe.scheduler = scheduler
    _check_count(pipe, result, len(seeds))
    return result


def _check_count(pipe: DiffusionPipeline, result: Any, expected: int) -> None:
    """Check how many samples came out: diffusers draws a batch of any size from a single generator."""
    drawn = result[0] if isinstance(result, tuple | BaseOutput) else result
    if isinstance(drawn, Sized) and len(drawn) != expected:
        raise CalibrationError(
            f"{type(pipe).__name__} returned {len(drawn)} samples, expected {expected}; the mapping in "
            f"`inputs` must describe exactly {expected}"
        )


def _call_arguments(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float | None,
    prompts: Sequence[str] | None,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    # One generator per sample, on the CPU: its noise depends neither on its neighbours nor on the device.
    ours: dict[str, Any] = {
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "num_inference_steps": num_inference_steps,
    }
    if guidance_scale is not None:
        ours["guidance_scale"] = guidance_scale
    if prompts is not None:
        ours["prompt"] = list(prompts)
    if "batch_size" in _parameters(pipe):
        ours["batch_size"] = len(seeds)
    given = dict(inputs)
    if taken := sorted(set(given) & {*ours, *_RESERVED}):
        raise CalibrationError(
            f"`inputs` has `{taken[0]}`, which calibrate sets itself; leave it out of the mapping"
        )
    if "output_type" in _parameters(pipe):  # the images are thrown away: do not decode them
        given.setdefault("output_type", "latent" if getattr(pipe, "vae", None) is not None else "pt")
    return ours | given


@contextmanager
def untouched(pipe: DiffusionPipeline, device: torch.device | None) -> Iterator[None]:
    """Run a block with `pipe` on `device`, in evaluation mode and silent; then it is as it was.

    Attributes, training modes and the device of every component are put back, also after an exception.
    """
    attributes = dict(vars(pipe))
    modules = [value for value in pipe.components.values() if isinstance(value, torch.nn.Module)]
    homes = [next((tensor.device for tensor in module.parameters()), None) for module in modules]
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        if device is not None:
            pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        for part in training:
            part.training = True
        if device is not None:
            for module, home in zip(modules, homes, strict=True):
                if home is not None:
                    module.to(home)
        vars(pipe).clear()
        vars(pipe).update(attributes)


def _parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


def _takes(pipe: DiffusionPipeline, argument: str) -> bool:
    parameters = _parameters(pipe)
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return anything or argument in parameters
