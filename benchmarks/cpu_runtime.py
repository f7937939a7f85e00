"""Measure the CPU runtime against float32 at the size of DDPM-CIFAR10: 35.7 million random weights.

    OMP_NUM_THREADS=1 python benchmarks/cpu_runtime.py --work runs/cpu_runtime
    OMP_NUM_THREADS=1 python benchmarks/cpu_runtime.py --work runs/cpu_runtime --only calls --openvino

    calls     one full denoiser evaluation: float32 eager and channels_last, bfloat16, the artifact; with
              `--openvino` also OpenVINO in float32 and quantized by NNCF (packages openvino and nncf)
    onnx      one full evaluation in onnxruntime: the float32 network, and the engine (extra `export`)
    kinds     where the time of an evaluation goes, by kind of layer
    sampling  a whole run with a cache against a whole float32 run, and the gain expected from int8 and
              from the saved multiply-adds together
    memory    resident memory that a loaded pipeline adds, in fresh processes (glibc)
    loading   seconds of `deploy.load`, verification included, and bytes on disk

Variants are timed in turn, round by round, so that a drift in the machine's speed cancels in the ratios; each
ratio is the median over rounds of float32's time to the variant's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from call_timing import WARM_UP_ROUNDS, Call, interleaved_seconds
from compress_cifar import cifar_pipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from work_folder import recorded

from errata import calibration, compress, deploy
from errata.deploy import DeployedPipeline
from errata.machine import describe_machine
from errata.memory import keep_freed_memory
from errata.runtime.branches import shallow_view
from errata.runtime.unet import BranchedUNet

PLAIN = "w8a8"
CACHED = ("w8a8+deepcache-10", "w8a8+deepcache-10:branch=1")
SIZES = ("w8a8", "w4a8")
TRAJECTORIES = 2
# Names of the profiler's events, by what they are called in the table.
KINDS = {
    "int8 products": ("errata::int8_product", "onednn::qconv", "onednn::qlinear"),
    "normalization, activation, quantization": (
        "errata::norm_quantize",
        "errata::layer_norm_quantize",
        "errata::quantize",
        "aten::native_group_norm",
    ),
    "attention": (
        "errata::attention",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product",
    ),
    "float layers": ("aten::mkldnn_convolution", "aten::addmm"),
    "additions": ("aten::add",),
    "copies and concatenations": ("errata::upsample", "aten::copy_", "aten::cat", "aten::fill_"),
}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description="The CPU runtime at the size of DDPM-CIFAR10.")
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts; reused if it exists")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        default=[part for part in PARTS if part != "onnx"],
        help="parts to measure (default: all but onnx)",
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="sampling steps of a whole run (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[8, 1], help="batch sizes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds per call (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, help="whole runs of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--head-width", type=int, help="width of the heads of attentions; another one needs another --work"
    )
    parser.add_argument("--openvino", action="store_true", help="also time OpenVINO")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.resident is not None:
        print(added_memory(options, options.resident))
        return
    keep_freed_memory()  # for all variants alike, as the `errata` command does
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in options.only:
        PARTS[part](options)


def network_of(options: argparse.Namespace) -> nn.Module:
    """The float network."""
    network: nn.Module = cifar_pipeline(head_width=options.head_width).unet
    return network


def artifact(options: argparse.Namespace, recipe: str) -> Path:
    """The artifact's folder, made unless it is there; recipes with a cache share its quantization."""
    name = f"{recipe.replace(':', '_').replace('=', '_')}-{options.steps}"
    out: Path = options.work / "artifacts" / name
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        deploy.deploy(compressed(options, recipe, name), out)
    return out


def compressed(options: argparse.Namespace, recipe: str, name: str) -> compress.CompressedPipeline:
    """The compressed pipeline, made unless it is there."""
    folder = options.work / "compressed" / name
    if folder.exists():
        return compress.load(folder)
    folder.parent.mkdir(exist_ok=True)
    reuse = None
    if recipe in CACHED:
        reuse = compressed(options, PLAIN, f"{PLAIN}-{options.steps}")
    pipe = cifar_pipeline(head_width=options.head_width)
    return compress.compress(pipe, recording(options, pipe), recipe, folder, reuse=reuse)


def recording(options: argparse.Namespace, pipe: Any) -> calibration.CalibrationSet:
    """Return a few trajectories, recorded unless they are there: only times matter here, not images."""
    folder = options.work / f"calibration-{options.steps}"
    return recorded(pipe, folder, steps=options.steps, samples=TRAJECTORIES, batch_size=TRAJECTORIES, seed=0)


@torch.no_grad()
def calls(options: argparse.Namespace) -> None:
    """One full evaluation, by batch size."""
    unet = network_of(options).eval()
    deployed = deploy.load(artifact(options, PLAIN))
    for batch_size in options.batch_sizes:
        x = noise(batch_size)
        variants = float_variants(unet, deployed, x)
        if options.openvino:
            variants |= openvino_variants(options, unet, x, deployed.denoiser.timesteps[0])
        variants["errata w8a8"] = lambda x=x: deployed.denoiser.full(x, 0, {})
        print(f"\none evaluation, batch {batch_size}, {options.rounds} rounds")
        print_ratios(timed(variants, options.rounds))


def float_variants(unet: nn.Module, deployed: DeployedPipeline, x: Tensor) -> dict[str, Call]:
    """The float network as it is, in the memory format that convolutions like best, and in half precision."""
    moment = torch.full((len(x),), deployed.denoiser.timesteps[0])
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    half = copy.deepcopy(unet).to(torch.bfloat16, memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    return {
        "float32 eager": lambda: unet(x, moment),
        "float32 channels_last": lambda: last(x_last, moment),
        "bfloat16 channels_last": lambda: half(x_last.bfloat16(), moment),
    }


def openvino_variants(
    options: argparse.Namespace, unet: nn.Module, x: Tensor, moment: float
) -> dict[str, Call]:
    """OpenVINO's float32, NNCF's post-training int8, and the artifact's engine, of one static shape."""
    import nncf
    import openvino

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor) -> Tensor:
            prediction: Tensor = self.unet(x, torch.full((len(x),), moment), return_dict=False)[0]
            return prediction

    converted = openvino.convert_model(Plain().eval(), example_input=x, input=[tuple(x.shape)])
    data = nncf.Dataset([noise(len(x), seed=seed).numpy() for seed in range(8)])
    quantized = nncf.quantize(converted, data, model_type=None)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    plain = openvino.compile_model(converted, "CPU", {**threads, "INFERENCE_PRECISION_HINT": "f32"})
    int8 = openvino.compile_model(quantized, "CPU", threads)
    array = x.numpy()
    variants: dict[str, Call] = {
        "OpenVINO float32": lambda: plain(array),
        "OpenVINO NNCF int8": lambda: int8(array),
    }
    if (file := engine_folder(options, "qdq") / "full.onnx").exists():  # after `--only onnx`
        model = openvino.Core().read_model(file)
        model.reshape({"sample": list(x.shape)})
        engine = openvino.compile_model(model, "CPU", threads)
        inputs = {"sample": array, "step": numpy.array(0)}
        variants["OpenVINO, the qdq engine"] = lambda: engine(inputs)
    return variants


def engine_folder(options: argparse.Namespace, form: str) -> Path:
    """Where the artifact's engine of that form is kept."""
    folder: Path = options.work / f"engine-{form}-{options.steps}"
    return folder


@torch.no_grad()
def onnx(options: argparse.Namespace) -> None:
    """The engine against the float32 network, both in onnxruntime, and what errata's own kernels take."""
    import onnxruntime

    from errata.deploy import engines

    source, folder = artifact(options, PLAIN), engine_folder(options, "gathered")
    for form in engines.FORMS:
        if not engine_folder(options, form).exists():
            engines.export_onnx(source, engine_folder(options, form), form=form)
    plain = options.work / "float.onnx"
    if not plain.exists():
        write_plain(network_of(options), plain)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(plain), settings, providers=["CPUExecutionProvider"])
    engine, own = engines.load(folder).denoiser, deploy.load(source).denoiser
    for batch_size in options.batch_sizes:
        x = noise(batch_size)
        array = {"sample": x.numpy()}
        print(f"\none evaluation in onnxruntime, batch {batch_size}; ratio to float32 there")
        variants: dict[str, Call] = {
            "onnxruntime float32": lambda array=array: session.run(None, array),
            "onnxruntime, the engine": lambda x=x: engine.full(x, 0, {}),
            "the artifact's own kernels": lambda x=x: own.full(x, 0, {}),
        }
        print_ratios(timed(variants, options.rounds))


def write_plain(unet: nn.Module, file: Path) -> None:
    """The float32 network as ONNX, for any number of samples at one time."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor) -> Tensor:
            prediction: Tensor = self.unet(x, 500, return_dict=False)[0]
            return prediction

    torch.onnx.export(
        Plain().eval(), (noise(2),), str(file), input_names=["sample"], output_names=["prediction"],
        dynamic_axes={"sample": {0: "batch"}}, opset_version=17, dynamo=False,
    )  # fmt: skip


@torch.no_grad()
def kinds(options: argparse.Namespace) -> None:
    """Where the time goes."""
    deployed = deploy.load(artifact(options, PLAIN))
    for batch_size in options.batch_sizes:
        x = noise(batch_size)
        for _ in range(WARM_UP_ROUNDS):
            deployed.denoiser.full(x, 0, {})
        with torch.profiler.profile() as profile:
            for _ in range(options.rounds):
                deployed.denoiser.full(x, 0, {})
        print(f"\nwhere the time goes, batch {batch_size}")
        spent = by_kind(profile)
        for kind, microseconds in spent.most_common():
            share = microseconds / spent.total()
            print(f"{kind:<42} {microseconds / options.rounds / 1000:>8.2f} ms {share:>7.1%}")


def by_kind(profile: torch.profiler.profile) -> Counter[str]:
    """Microseconds by kind; the rest is called "other"."""
    spent: Counter[str] = Counter()
    for event in profile.key_averages():
        names = (kind for kind, starts in KINDS.items() if event.key.startswith(starts))
        spent[next(names, "other")] += event.self_cpu_time_total
    return spent


def sampling(options: argparse.Namespace) -> None:
    """Whole runs, with the gain that int8 and the cache promise together."""
    batch_size = options.batch_sizes[0]
    pipe = cifar_pipeline(head_width=options.head_width)
    plain = deploy.load(artifact(options, PLAIN))
    runs: dict[str, Call] = {"float32": lambda: sample(pipe, options.steps, batch_size)}
    runs[PLAIN] = lambda: sample(plain, options.steps, batch_size)
    artifacts = {recipe: deploy.load(artifact(options, recipe)) for recipe in CACHED}
    for recipe, deployed in artifacts.items():
        runs[recipe] = lambda deployed=deployed: sample(deployed, options.steps, batch_size)
    print(f"\n{options.steps} steps, batch {batch_size}, {options.runs} runs of each")
    ratios = timed(runs, options.runs, warm_up=0)
    print_ratios(ratios)
    int8_gain = ratios[PLAIN][1]
    for recipe, deployed in artifacts.items():
        saved = multiply_add_gain(pipe.unet, deployed)
        gain = ratios[recipe][1]
        print(
            f"{recipe}: int8 {int8_gain:.2f} x multiply-adds {saved:.2f} promise {int8_gain * saved:.2f}; "
            f"measured {gain:.2f}, {gain / (int8_gain * saved):.0%} of it"
        )


def sample(pipeline: Any, steps: int, batch_size: int) -> None:
    """One batch."""
    generator = torch.Generator().manual_seed(0)
    pipeline(batch_size=batch_size, generator=generator, num_inference_steps=steps, output_type="np")


@torch.no_grad()
def multiply_add_gain(unet: nn.Module, deployed: DeployedPipeline) -> float:
    """Multiply-adds of a run without the cache over those with it."""
    schedule = deployed.schedule
    x, moment = noise(1), torch.ones(1)
    _, feature = BranchedUNet(unet).full(x, 1.0, {}, branch=schedule.branch)
    assert feature is not None  # these artifacts have a cache
    full = multiply_adds(lambda: unet(x, moment))
    cached = multiply_adds(lambda: shallow_view(unet, feature, branch=schedule.branch)(x, moment))
    steps, refreshed = schedule.num_steps, len(schedule.full_steps)
    return steps * full / (refreshed * full + (steps - refreshed) * cached)


def multiply_adds(call: Call) -> int:
    """Of convolutions and products of matrices."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def memory(options: argparse.Namespace) -> None:
    """Resident memory, a process for each measurement."""
    artifact(options, PLAIN)
    found: dict[str, list[int]] = {"float32": [], PLAIN: []}
    for _ in range(options.runs):
        for kind, values in found.items():
            command = [sys.executable, *sys.argv, "--resident", kind]
            values.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1]))
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    print("\nresident memory that a pipeline adds, after one evaluation of one image")
    for kind, value in medians.items():
        print(f"{kind:<42} {value / 1e6:>8.1f} MB {value / medians['float32']:>7.2f}")


def added_memory(options: argparse.Namespace, kind: str) -> int:
    """Bytes that this process grows by when it loads and uses a pipeline."""
    x, moment = noise(1), torch.ones(1)
    torch.conv2d(x, torch.ones(8, 3, 3, 3))  # libraries allocate at their first use
    if kind == "float32":
        folder = options.work / "float32"
        if not folder.exists():
            subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True, cwd=Path(__file__).parent)
        before = resident()
        unet = calibration.load_pipeline(str(folder)).unet.eval()
        with torch.no_grad():
            unet(x, moment)
    else:
        before = resident()
        deployed = deploy.load(artifact(options, kind))
        deployed.denoiser.full(x, 0, {})
    return resident() - before


SAVE = "import sys; from compress_cifar import cifar_pipeline; cifar_pipeline().save_pretrained(sys.argv[1])"


def resident() -> int:
    """Bytes of this process that are in memory, without what its allocator holds free."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def loading(options: argparse.Namespace) -> None:
    """Seconds from a folder to a pipeline, and what the folder holds."""
    print("\nloading, verification included; bytes of the denoiser on disk over float32's")
    for recipe in SIZES:
        folder = artifact(options, recipe)
        seconds = []
        for _ in range(options.runs + 1):
            start = time.perf_counter()
            deployed = deploy.load(folder)
            seconds.append(time.perf_counter() - start)
        ratio = deployed.manifest.denoiser_bytes / deployed.manifest.float32_weight_bytes
        print(f"{recipe:<42} {statistics.median(seconds[1:]):>8.2f} s {ratio:>9.3f}")


def noise(batch_size: int, *, seed: int = 0) -> Tensor:
    """An input of the network, (B, 3, 32, 32)."""
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def timed(
    variants: Mapping[str, Call], rounds: int, *, warm_up: int = WARM_UP_ROUNDS
) -> dict[str, tuple[float, float]]:
    """Return the median seconds of each variant, and the median ratio of the first one's time to it."""
    seconds = interleaved_seconds(variants, rounds, warm_up=warm_up)
    first = next(iter(seconds.values()))
    return {
        name: (
            statistics.median(times),
            statistics.median(base / one for base, one in zip(first, times, strict=True)),
        )
        for name, times in seconds.items()
    }


def print_ratios(ratios: Mapping[str, tuple[float, float]]) -> None:
    """One line each."""
    for name, (seconds, ratio) in ratios.items():
        print(f"{name:<42} {1000 * seconds:>10.1f} ms {ratio:>6.2f} x")


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "calls": calls,
    "onnx": onnx,
    "kinds": kinds,
    "sampling": sampling,
    "memory": memory,
    "loading": loading,
}

if __name__ == "__main__":
    main()
