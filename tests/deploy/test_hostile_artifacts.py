"""Artifacts that were damaged, or made to do harm: every one is refused, in words, and at little cost."""

import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errata import deploy
from errata.errors import ArtifactError


def _sibling(name: str) -> Any:
    """A module of this folder; under `--import-mode=importlib` no import statement finds it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harm = _sibling("corruptions")
MANIFEST, WHOLE, UNET, SCHEDULER, INDEX = harm.MANIFEST, harm.WHOLE, harm.UNET, harm.SCHEDULER, harm.INDEX
SECONDS, MEMORY = 5, 2**30
LAYER, CONV = "mid_block.resnets.0.conv1", "conv_in"
RECORD = {"bytes": 1, "sha256": "0" * 64}
KEYS = [
    "calibration", "files", "float32_weight_bytes", "made_by", "pipeline_class", "recipe", "sampler",
    "schedule", "scheduler_config", "scheme", "unet_class",
]  # fmt: skip

BYTES = {
    "a bit of the manifest": (harm.flip(MANIFEST, 40), "errata.json .*(valid JSON|own digest)"),
    "a bit of the settings": (harm.flip(UNET, 40), "config.json was altered: its SHA-256"),
    "a bit of the scheduler": (harm.flip(SCHEDULER, 40), "scheduler_config.json was altered"),
    "a bit of the index": (harm.flip(INDEX, 40), "model_index.json was altered"),
    "a bit of the header's length": (harm.flip(WHOLE, 0), "errata.safetensors was altered"),
    "a bit of the header": (harm.flip(WHOLE, 100), "errata.safetensors was altered"),
    "a bit of the last code": (harm.flip(WHOLE, -1), "errata.safetensors was altered"),
    "one byte less": (harm.cut(WHOLE, -1), "bytes, the manifest says"),
    "half a header": (harm.cut(WHOLE, 100), "100 bytes, the manifest says"),
    "no tensors": (harm.cut(WHOLE, 0), "has 0 bytes, the manifest says"),
    "half a manifest": (harm.cut(MANIFEST, 900), "errata.json is not valid JSON"),
    "no manifest": (harm.cut(MANIFEST, 0), "errata.json is not valid JSON"),
    "one byte more": (harm.raw(WHOLE, lambda data: data + b"\0"), "bytes, the manifest says"),
    "swapped files": (harm.swap(UNET, SCHEDULER), "bytes, the manifest says"),
}
JSON = {
    "a list": (harm.raw(MANIFEST, b"[]\n"), "holds a list, not a manifest"),
    "a key twice": (harm.raw(MANIFEST, b'{"format":1,"format":2}'), "duplicate key 'format'"),
    "a key twice among many": (
        harm.raw(MANIFEST, b"{" + b"".join(b'"%d":0,' % i for i in range(300_000)) + b'"7":0}'),
        "duplicate key '7'",
    ),
    "NaN": (harm.raw(MANIFEST, b'{"format":NaN}'), "NaN is not a JSON number"),
    "infinity": (harm.raw(MANIFEST, b'{"format":1e999}'), "1e999 is too large"),
    "a number of 10,000 digits": (harm.raw(MANIFEST, b'{"a":' + b"9" * 10_000 + b"}"), "is not valid JSON"),
    "half a letter": (harm.raw(MANIFEST, b'{"\xff":1}'), "is not valid JSON"),
    "UTF-16": (harm.raw(MANIFEST, lambda data: data.decode().encode("utf-16")), "is not valid JSON"),
    "a mark of byte order": (harm.raw(MANIFEST, lambda data: b"\xef\xbb\xbf" + data), "is not valid JSON"),
    "a space": (harm.raw(MANIFEST, lambda data: data + b" "), "its own digest does not match"),
    "a letter spelled out": (
        harm.raw(MANIFEST, lambda data: data.replace(b"DDIM", rb"\u0044DIM")), "its own digest does not match"
    ),
    "a lone surrogate": (
        harm.raw(MANIFEST, lambda data: data.replace(b"DDIM", rb"\ud800")), "its own digest does not match"
    ),
    "900 lists": (harm.raw(MANIFEST, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "nested more than 64 deep"),
    "a million lists": (harm.raw(MANIFEST, b"[" * 10**6), "nested too deep"),
    "nine megabytes": (harm.raw(MANIFEST, b" " * 9 * 2**20), "errata.json has 9,437,184 bytes"),
    "deep settings": (
        harm.file(UNET, b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"), "config.json .* nested more than 64"
    ),
    "large settings": (harm.file(UNET, b" " * 2**21), "config.json has 2,097,152 bytes; JSON of this kind"),
    "settings that are a text": (harm.file(UNET, b'"google/ddpm"'), "config.json holds a str, not an object"),
    "an index that is none": (harm.file(INDEX, b"null"), "model_index.json holds a NoneType"),
}  # fmt: skip
LIES: dict[str, Any] = {
    "another format": (harm.put("format", value="errata-artifact/3"), "format 'errata-artifact/3'; this ver"),
    "a format that is a number": (harm.put("format", value=1), "has format '1'; this version reads"),
    "no format": (harm.without("format"), "has format 'None'; this version"),
    "an unknown key": (harm.put("comment", value="x"), r"has unknown keys: \['comment'\]"),
    **{
        f"no {key}": (harm.without(key), rf"has no keys \['{key}'\]")
        for key in KEYS
    },
    "a digest that is another's": (harm.put("files", WHOLE, "sha256", value="0" * 64), "its SHA-256 is not"),
    "no digest": (harm.put("files", WHOLE, "sha256", value=None), "needs a size and a digest, got .* None"),
    "a size off by one": (harm.put("files", WHOLE, "bytes", value=1), "the manifest says 1;"),
    "a size below zero": (harm.put("files", WHOLE, "bytes", value=-1), "needs a size and a digest, got -1"),
    "a size that is true": (harm.put("files", WHOLE, "bytes", value=True), "needs a size and a digest, got "),
    "a record with more": (harm.put("files", WHOLE, "url", value="http://x"), "not have exactly the keys"),
    "files that are a list": (harm.put("files", value=[]), "files is a list, not an object"),
    "100,000 files": (
        harm.signed(lambda manifest: manifest["files"].update((f"f{i}", {}) for i in range(100_000))),
        "file 'f0' does not have exactly the keys",
    ),
    "another network": (harm.put("unet_class", value="os.system"), "needs denoiser class 'os.system'"),
    "a network that is a number": (harm.put("unet_class", value=1), "unet_class is '1', not a text"),
    "another pipeline": (harm.put("pipeline_class", value="LDMPipeline"), "pipeline_class does not fit"),
    "other steps": (harm.put("sampler", "timesteps", value=[1.0]), "timesteps does not fit"),
    "steps that are words": (harm.put("sampler", "timesteps", value=["1"] * 6), "its sampler would be writt"),
    "no steps at all": (harm.put("sampler", "num_inference_steps", value=0), "num_inference_steps does not"),
    "another scheduler": (harm.put("sampler", "scheduler_class", value="X"), "scheduler_class does not fit"),
    "other settings": (harm.put("scheduler_config", "steps_offset", value=1), "scheduler_config does not fi"),
    "smaller float weights": (harm.put("float32_weight_bytes", value=8), "float32_weight_bytes does not fit"),
    "no whole size": (harm.put("float32_weight_bytes", value=1.5), "weight_bytes is not a whole number"),
    "an escape sequence": (harm.put("made_by", "errata", value="\x1b[2J"), "made_by says .* not a short"),
    "makers that are a list": (harm.put("made_by", value=[]), "made_by is a list, not an object"),
    "a tree of calibration": (harm.put("calibration", "num_samples", value=[[]]), "calibration says 'num_sa"),
    "10^12 calls": (harm.put("schedule", "num_steps", value=10**12), "num_steps=1000000000000; allowed"),
    "10^12 calls a step": (harm.put("schedule", "calls_per_step", value=10**12), "calls_per_step=1000000000"),
    "no calls": (harm.put("schedule", "num_steps", value=0), "num_steps=0; allowed are whole numbers"),
    "no first step": (harm.put("schedule", "full_steps", value=[3]), "step 0 must be a full step"),
    "steps beyond the run": (harm.put("schedule", "full_steps", value=[0, 10**9]), "sorted, unique and belo"),
    "other full steps": (harm.put("schedule", "full_steps", value=[0, 5]), "schedule does not fit"),
    "a branch too many": (harm.put("schedule", "branch", value=99), "branch|schedule does not fit"),
    "a branch below zero": (harm.put("schedule", "branch", value=-1), "branch=-1 cannot serve"),
    "no layers": (harm.put("scheme", "layers", value=[]), "scheme does not fit the recipe"),
    "a layer less": (harm.signed(lambda value: value["scheme"]["layers"].pop()), "scheme does not fit"),
    "a layer twice": (
        harm.signed(lambda value: value["scheme"]["layers"].append(value["scheme"]["layers"][0])),
        "scheme does not fit",
    ),
    "16-bit weights": (harm.put("scheme", "layers", 3, "weight_bits", value=16), "scheme does not fit"),
    "true instead of 1": (harm.put("scheme", "layers", 0, "input_widths", value=[True]), "scheme does not"),
    "a layer of another name": (
        harm.put("scheme", "layers", 0, "name", value="__class__"), "does not describe the denoiser"
    ),
    "corrections of one channel": (
        harm.put("scheme", "correction", "feature_channels", value=1), "scheme does not fit"
    ),
    "an unknown choice": (harm.put("recipe", "magic", value=1), "unknown or missing keys in the recipe"),
    "2-bit weights": (harm.put("recipe", "quantization", "weight_bits", value=2), "weight_bits=2 is not sup"),
    "an interval of zero": (harm.put("recipe", "cache", "interval", value=0), "the cache interval must be"),
    "a pattern of a megabyte": (
        harm.put("recipe", "quantization", "bits", value={"*a" * 500_000: 4}), "has 1,000,000 characters"
    ),
    "a hundred thousand patterns": (
        harm.put("recipe", "quantization", "bits", value={f"conv_i?{'*' * i}": 8 for i in range(200)}
                 | {f"[c{i}]onv_in": 8 for i in range(99_800)}),
        "100,000 patterns for .* modules are too many",
    ),
}  # fmt: skip
FILES: dict[str, Any] = {
    **{
        f"a path {name!r}": (harm.listed(name, RECORD), "names a file outside the artifact")
        for name in ("../outside", "/etc/passwd", "unet/../x", "unet//x", "./x", "unet\\x", "")
    },
    **{
        f"a name {name!r}": (harm.listed(name, RECORD), "names the file .*; allowed are letters, digits")
        for name in (".hidden", "unet/.x", "-rf", "C:x", "a b", "\u0430.json", "x\0y", "x\ny", "unet/x:y")
    },
    "a name in capitals": (harm.listed("Unet/config.json", RECORD), "which some systems take for one file"),
    "the manifest itself": (harm.listed(MANIFEST, RECORD), "names 'errata.json' and 'errata.json'"),
    "a file that is not there": (harm.listed("unet/more.json", RECORD), "unet/more.json is missing"),
    "a file that is not listed": (harm.raw("unet/x.json", b"{}"), "x.json is not listed in the manifest"),
    "a README": (harm.raw("README.md", b"x"), "README.md is not listed in the manifest"),
    "an empty directory": (harm.made("vae"), "vae is an empty directory"),
    "a directory for a file": (
        harm.in_order(harm.lost(UNET), harm.made(UNET)), "config.json is an empty directory"
    ),
    "a pipe": (harm.made("unet/pipe", what=os.mkfifo), "pipe is a link or special file"),
    "a link for a file": (harm.link(UNET, "elsewhere"), "config.json is a link or special file"),
    "a link for a directory": (harm.link("unet", "elsewhere"), "unet is a link or special file"),
    "a link for the manifest": (harm.link(MANIFEST, "elsewhere"), "errata.json is a link or special file"),
    "a link to nowhere": (harm.link("unet/x", "nowhere"), "x is a link or special file"),
    "a link to itself": (harm.link("unet/x", "artifact/unet/x"), "x is a link or special file"),
    "no settings": (harm.in_order(harm.lost(UNET), harm.sign), "has no unet/config.json"),
    "no index": (harm.in_order(harm.lost(INDEX), harm.sign), "has no model_index.json"),
    "no scheduler": (
        harm.in_order(harm.lost(SCHEDULER), harm.lost("scheduler"), harm.sign), "has no scheduler/scheduler"
    ),
    "a deeper directory": (
        harm.in_order(harm.made("unet/deep"), harm.file("unet/deep/x.json", b"{}")), "belongs to no component"
    ),
    "a component of its own": (harm.file("vae/config.json", b"{}"), "belongs to no component of model_index"),
    **{
        f"a listed {name}": (harm.file(f"unet/{name}", harm.PICKLE), f"unet/{name} is not allowed: a compo")
        for name in (
            "weights.pkl", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "code.py", "x.so",
            "model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_config.json",
            "diffusion_pytorch_model.safetensors.index.json", "errata.safetensors.index.json",
        )
    },
    "a pickle for tensors": (harm.file(WHOLE, harm.PICKLE), "is not a safetensors file"),
    "a pickle for settings": (harm.file(UNET, harm.PICKLE), "config.json is not valid JSON"),
    "a pickle for the manifest": (harm.raw(MANIFEST, harm.PICKLE), "errata.json is not valid JSON"),
    "an archive for tensors": (
        harm.in_order(lambda root: torch.save({"x": torch.ones(1)}, root / WHOLE), harm.sign),
        "is not a safetensors file",
    ),
}  # fmt: skip
CLASSES: dict[str, Any] = {
    **{
        f"a setting {name}": (harm.settings(UNET, **{name: value}), "a setting that names a file, a model or")
        for name, value in {
            "auto_map": {"AutoModel": "code.Model"}, "_name_or_path": "someone/model", "vocab_file": "/etc/x",
            "custom_pipelines": {"x": {"pt": ["x"]}}, "quantization_config": {"quant_method": "awq"},
        }.items()
    },
    "a scheduler of os": (harm.settings(INDEX, scheduler=["os", "system"]), "library 'os' is not allowed"),
    "a scheduler of code": (harm.settings(INDEX, scheduler=["code", "X"]), "library 'code' is not allowed"),
    "a scheduler that is a model": (
        harm.settings(INDEX, scheduler=["diffusers", "AutoencoderKL"]), "'scheduler' is 'AutoencoderKL'"
    ),
    "a hidden class": (harm.settings(INDEX, scheduler=["diffusers", "__doc__"]), "no model, .* '__doc__'"),
    "a pipeline of code": (
        harm.in_order(harm.settings(INDEX, _class_name="X"), harm.put("pipeline_class", value="X")),
        "'X' is not a DiffusionPipeline",
    ),
    "a pipeline beside its code": (
        harm.settings(INDEX, _class_name=["pipeline", "X"]), "pipeline_class does not fit"
    ),
    "a component too many": (harm.settings(INDEX, vae=["diffusers", "VQModel"]), "does not take 'vae'"),
    "a component that is none": (harm.settings(INDEX, vae=[1, 2]), "'vae' is neither a component nor a se"),
    "no network": (harm.settings(INDEX, unet=[None, None]), "has no 'unet'"),
    "a version that is none": (harm.settings(INDEX, _diffusers_version="x"), "_diffusers_version='x', which"),
    "another class of network": (harm.settings(UNET, _class_name="VQModel"), "unet_class does not fit"),
    "10^7 layers": (harm.settings(UNET, layers_per_block=10**7), "more than 20,000 modules and parameters"),
    "10^30 channels": (harm.settings(UNET, in_channels=10**30), "whole numbers there are at most 16,777,216"),
    "many channels": (harm.settings(UNET, block_out_channels=[2**24] * 2), "does not fit|not describe the d"),
    "no channels": (harm.settings(UNET, block_out_channels=[0, 0]), "does not fit|does not describe the den"),
    "fewer channels": (harm.settings(UNET, block_out_channels=[8, 8]), "scheme does not fit"),
    "unknown blocks": (harm.settings(UNET, down_block_types=["../x", "y"]), "does not describe the denoiser"),
    "a number that is a word": (harm.settings(UNET, freq_shift={"$float": "x"}), "config.json is not readab"),
    "absurd padding": (harm.settings(UNET, downsample_padding=10**6), "the padding .*; allowed are pairs of"),
    "absurd images": (harm.settings(UNET, sample_size=10**6), "sample_size=1000000; allowed are"),
    "images that are words": (harm.settings(UNET, sample_size="wide"), "sample_size=wide; allowed are"),
    "10^12 training steps": (harm.settings(SCHEDULER, num_train_timesteps=10**12), "numbers there are at mo"),
    "an unknown schedule": (harm.settings(SCHEDULER, beta_schedule="nope"), "does not make a DDIMScheduler:"),
    "a scheduler of another class": (
        harm.settings(SCHEDULER, _class_name="PNDMScheduler"), "scheduler_class does not fit"
    ),
}  # fmt: skip
TENSORS: dict[str, Any] = {
    "a tensor less": (harm.tensors(lambda held: held.pop(f"{CONV}.bias")), "1 tensors .*missing.*'conv_in"),
    "a tensor more": (harm.tensors(lambda held: held.update(x=torch.ones(1))), "holds 1 tensors that are"),
    "a float weight beside its codes": (
        harm.tensors(lambda held: held.update({f"{LAYER}.weight": torch.ones(16, 16, 3, 3)})),
        f"that are not in the scheme; the first is '{LAYER}.weight'",
    ),
    "codes in float": (harm.filled(f"{CONV}.codes", 1, torch.float32), "'conv_in.codes' is torch.float32"),
    "codes without sign": (harm.filled(f"{CONV}.codes", 1, torch.uint8), "'conv_in.codes' is torch.uint8"),
    "codes of -128": (harm.filled(f"{CONV}.codes", -128), "'conv_in.codes' holds a code outside the symmet"),
    "4-bit codes of -8": (harm.filled(f"{LAYER}.codes", 0x80), f"'{LAYER}.codes' holds a code outside"),
    "4-bit codes unpacked": (
        harm.tensors(lambda held: held.update({f"{LAYER}.codes": torch.zeros(16, 16, 3, 3).char()})),
        f"'{LAYER}.codes' is torch.int8",
    ),
    **{
        f"an input scale of {value}": (harm.filled(f"{CONV}.input.0.scale", value), f"scale' holds {words}")
        for value, words in {
            float("nan"): "NaN or infinity", float("inf"): "NaN or infinity", 0.0: "a scale that is not pos",
            -1.0: "a scale that is not positive",
            3e38: "a scale that makes code 255 infinite",
        }.items()
    },
    **{
        f"a weight scale of {value}": (harm.filled(f"{LAYER}.weight_scale", value), f"scale' holds {words}")
        for value, words in {
            float("nan"): "NaN or infinity", float("-inf"): "NaN or infinity", 0.0: "a scale that is not pos",
            -1e-30: "a scale that is not positive", 3e38: "a scale that makes code 127 infinite",
        }.items()
    },
    "an attention scale of 0": (
        harm.filled("mid_block.attentions.0.probabilities.scale", 0.0), "scale' holds a scale that is not pos"
    ),
    "scales in half precision": (
        harm.filled(f"{CONV}.weight_scale", 1, torch.float16), "'conv_in.weight_scale' is torch.float16"
    ),
    "a zero point below 0": (
        harm.filled(f"{CONV}.input.0.zero_point", -1, torch.int8), "zero_point' is torch.int8"
    ),
    "a zero point of 256": (
        harm.filled(f"{CONV}.input.0.zero_point", 256, torch.int16), "zero_point' is torch.int16"
    ),
    "a zero point of NaN": (
        harm.filled(f"{CONV}.input.0.zero_point", float("nan"), torch.float32), "zero_point' is torch.float32"
    ),
    "a bias of NaN": (harm.filled(f"{CONV}.bias", float("nan")), "'conv_in.bias' holds NaN or infinity"),
    "a norm of infinity": (harm.filled("conv_norm_out.weight", float("inf")), "conv_norm_out.weight' holds "),
    "a norm in half precision": (
        harm.filled("conv_norm_out.weight", 1, torch.bfloat16), "conv_norm_out.weight' is torch.bfloat16"
    ),
    "a correction of NaN": (harm.filled("cache.gain", float("nan")), "'cache.gain' holds NaN or infinity"),
    "scales of a step less": (
        harm.tensors(lambda held: held.update({f"{CONV}.input.0.scale": torch.ones(5)})),
        r"scale' is torch.float32 \(5,\), the scheme",
    ),
    "a scale for all channels": (
        harm.tensors(lambda held: held.update({f"{LAYER}.weight_scale": torch.ones(1)})), "is torch.float32"
    ),
    "swapped codes": (
        harm.tensors(lambda held: held.update({
            f"{CONV}.codes": held["conv_out.codes"], "conv_out.codes": held[f"{CONV}.codes"].clone()})),
        r"codes' is torch.int8 \(1, 16, 3, 3\)",
    ),
    "swapped scale and zero point": (
        harm.tensors(lambda held: held.update({
            f"{CONV}.input.0.scale": held[f"{CONV}.input.0.zero_point"],
            f"{CONV}.input.0.zero_point": held[f"{CONV}.input.0.scale"]})),
        "is torch.(uint8|float32)",
    ),
    "transposed codes": (
        harm.tensors(lambda held: held.update({f"{CONV}.codes": held[f"{CONV}.codes"].mT.flatten()})),
        "'conv_in.codes' is torch.int8",
    ),
    "a tensor in a billion billion": (
        harm.entry(f"{CONV}.codes", shape=[2**30, 2**30]), "'conv_in.codes' is I8 .* bytes, and has 144"
    ),
}  # fmt: skip
HEADERS: dict[str, Any] = {
    "a header of 2^63 bytes": (harm.declared(2**63), "it declares a header of 9,223,372,036,854,775,808 byt"),
    "a header of 2^40 bytes": (harm.declared(2**40), "it declares a header of 1,099,511,627,776 bytes"),
    "a header beyond the end": (harm.declared(2**20), "it declares a header of 1,048,576 bytes, and has"),
    "a header of 17 megabytes": (
        harm.header(lambda value: json.dumps(value).encode() + b" " * 17 * 2**20), "declares a header of 17,"
    ),
    "a header of nothing": (harm.declared(0), "its header starts with b''"),
    "a header of one byte": (harm.declared(1), "its header is not valid JSON"),
    "7 bytes": (harm.file(WHOLE, b"\1\0\0\0\0\0\0"), "7 bytes cannot hold the length of a header"),
    "a header that is a list": (harm.header(lambda value: b"[1]"), "not with an object"),
    "a header of half letters": (harm.header(lambda value: b'{"\xff\xfe":1}'), "header is not valid JSON"),
    "a header 100,000 deep": (harm.header(lambda value: b'{"a":' * 100_000), "header is not valid JSON: nes"),
    "a header of five million values": (
        harm.header(lambda value: b"{" + b",".join([b"0"] * 5_000_000) + b"}"), "about 5,000,000 values; allo"
    ),
    "a tensor declared twice": (
        harm.header(lambda value: b'{"x":{},"x":{}}'), "header is not valid JSON: duplicate key 'x'"
    ),
    "a tensor that is a number": (harm.header(lambda value: value.update(x=1)), "tensor 'x' does not have e"),
    "a tensor without offsets": (
        harm.header(lambda value: value[f"{CONV}.bias"].pop("data_offsets")), "does not have exactly the keys"
    ),
    "a tensor elsewhere": (harm.entry(f"{CONV}.bias", file="other"), "does not have exactly the keys"),
    "an unknown type": (harm.entry(f"{CONV}.codes", dtype="F8_E4M3"), "has the type 'F8_E4M3'; allowed are"),
    "a type that is a list": (harm.entry(f"{CONV}.codes", dtype=[]), "has the type .*; allowed are"),
    "a shape below zero": (harm.entry(f"{CONV}.codes", shape=[-16, -9]), "has an invalid shape"),
    "a shape of fractions": (harm.entry(f"{CONV}.codes", shape=[16.0, 9]), "has an invalid shape"),
    "a shape of truths": (harm.entry(f"{CONV}.codes", shape=[True, 144]), "has an invalid shape"),
    "nine dimensions": (harm.entry(f"{CONV}.codes", shape=[1] * 9), "has an invalid shape"),
    "a side of 2^60": (harm.entry(f"{CONV}.codes", shape=[0, 2**60]), "has an invalid shape"),
    "offsets below zero": (harm.entry(f"{CONV}.codes", data_offsets=[-144, 0]), "invalid data_offsets"),
    "offsets in reverse": (harm.entry(f"{CONV}.codes", data_offsets=[144, 0]), "and has -144"),
    "three offsets": (harm.entry(f"{CONV}.codes", data_offsets=[0, 1, 2]), "invalid data_offsets"),
    "offsets beyond the end": (
        harm.entry(f"{CONV}.codes", data_offsets=[2**50, 2**50 + 144]), "larger than the file"
    ),
    "tensors that overlap": (harm.entry("cache.gain", data_offsets=[4, 388]), "and (overlaps|leaves a gap)"),
    "bytes of no tensor": (harm.header(lambda value: None, b"secret"), "6 bytes after the last tensor belon"),
    "metadata": (harm.header(lambda value: value.update(__metadata__={"a": "b"})), "has metadata, which the"),
    "metadata that is a number": (
        harm.header(lambda value: value.update(__metadata__={"a": 1})), "metadata__ is not an object of texts"
    ),
}  # fmt: skip
SHARDS: dict[str, Any] = {
    "one shard": (harm.sharded("errata-00001-of-00001.safetensors"), "has 1 shards .* does not fit"),
    "a shard less": (
        harm.sharded("errata-00001-of-00003.safetensors", "errata-00002-of-00003.safetensors"),
        "does not fit",
    ),
    "a shard from 0": (
        harm.sharded("errata-00000-of-00002.safetensors", "errata-00001-of-00002.safetensors"),
        "does not fit",
    ),
    "two totals": (
        harm.sharded("errata-00001-of-00002.safetensors", "errata-00002-of-00003.safetensors"),
        "does not fit",
    ),
    "six digits": (
        harm.sharded("errata-000001-of-000002.safetensors", "errata-000002-of-000002.safetensors"),
        "has no unet/errata.safetensors and no shards",
    ),
    "a shard beside the whole": (
        harm.file("unet/errata-00001-of-00002.safetensors", b"x"),
        "has both unet/errata.safetensors and",
    ),
    "a tensor in two shards": (
        harm.sharded("errata-00001-of-00002.safetensors", "errata-00002-of-00002.safetensors", again=True),
        "holds tensor 'cache.gain', which errata-00001-of-00002.safetensors holds too",
    ),
    "an empty shard": (
        harm.sharded("errata-00001-of-00002.safetensors", "errata-00002-of-00002.safetensors", empty=True),
        "errata-00002-of-00002.safetensors is an empty shard",
    ),
}
TABLE = {
    f"{kind}: {name}": case
    for kind, cases in {
        "bytes": BYTES, "json": JSON, "lies": LIES, "files": FILES, "classes": CLASSES, "tensors": TENSORS,
        "headers": HEADERS, "shards": SHARDS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


@pytest.fixture
def artifact(tiny_artifact: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the smallest artifact that has everything: 4 and 8 bits, attention, a corrected cache."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_artifact("w4a8+cachequant-2"), tmp_path / "artifact"))


class TooSlow(BaseException):
    """No `Exception`, which the code under test might turn into one of its own."""


@contextmanager
def at_little_cost() -> Iterator[None]:
    """No more than so much time, and where it can be limited, memory, on top of what is in use."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"not done after {SECONDS} seconds")

    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", TABLE)
def test_it_is_refused(name: str, artifact: Path, tmp_path: Path) -> None:
    change, message = TABLE[name]
    change(artifact)
    for check in (deploy.verify, deploy.load):
        start = time.monotonic()
        with at_little_cost(), pytest.raises(ArtifactError, match=message) as caught:
            check(artifact)
        assert time.monotonic() - start < SECONDS
        said = str(caught.value)
        assert "\n" not in said
        assert "\x1b" not in said
        assert len(said) < 1500
    assert not (tmp_path / "ran").exists()


def test_there_are_enough() -> None:
    assert len(TABLE) >= 100


@pytest.mark.parametrize(
    "harmless",
    [
        lambda root: None,
        harm.sign,
        harm.header(lambda value: None),
        harm.header(lambda value: json.dumps(value).encode() + b"   "),
        harm.tensors(lambda held: None),
        harm.settings(UNET),
        harm.settings(SCHEDULER),
        harm.sharded("errata-00001-of-00002.safetensors", "errata-00002-of-00002.safetensors"),
    ],
)
def test_what_was_only_written_anew_is_accepted(harmless: Callable[[Path], object], artifact: Path) -> None:
    """Else the harms above could be refused for the way in which they are done."""
    harmless(artifact)
    with at_little_cost():
        assert deploy.verify(artifact).recipe.name == "w4a8+cachequant-2"
        assert deploy.load(artifact).manifest.is_quantized


def test_a_payload_would_run_if_it_were_opened(artifact: Path, tmp_path: Path) -> None:
    import pickle

    pickle.loads(harm.PICKLE)
    assert (tmp_path / "ran").is_dir()


def test_any_altered_byte_is_refused(artifact: Path) -> None:
    """Every 499th byte of every file, each with another of its bits."""
    files = [path for path in artifact.rglob("*") if path.is_file()]
    for path, bit in zip(files, itertools.cycle(range(8)), strict=False):
        data = path.read_bytes()
        for position in range(bit, len(data), max(1, len(data) // 9)):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(ArtifactError):
                deploy.verify(artifact)
        path.write_bytes(data)
    deploy.verify(artifact)


def test_swapped_layers_have_another_identity(artifact: Path) -> None:
    """What a digest cannot tell, and a signature can: layers of one shape that change places."""
    before = deploy.verify(artifact).sha256
    names = [f"{LAYER}.codes", "mid_block.resnets.0.conv2.codes"]
    held = load_file(artifact / WHOLE)
    assert not torch.equal(*(held[name] for name in names))
    harm.tensors(
        lambda held: held.update(zip(names, [held[name].clone() for name in names[::-1]], strict=True))
    )(artifact)
    assert deploy.verify(artifact).sha256 != before
