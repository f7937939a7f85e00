"""Guidance in two denoiser calls per step: the same images as in one doubled batch, through the whole life.

The two calls of a step make two streams. A cache that mixes them reads the feature of another condition; what
such a schedule draws is compared with here, to show that the tolerances would see it.
"""

import copy
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor

from errata import calibration, cli, compress, deploy
from errata.calibration import CalibrationSet
from errata.canonical_json import digest, dumps
from errata.compress import CacheSchedule, CompressedPipeline, Recipe
from errata.compress.cache.cache_features import feature_distances
from errata.compress.jobs.dry_run import Preview
from errata.compress.quantize.recorded_inputs import mixed_rows
from errata.errors import ArtifactCorruptError, ArtifactMismatchError, RecipeError
from errata.pipelines import ClassConditionalLDMPipeline
from errata.runtime.unet import BranchedUNet

Build = Callable[[str], Any]
LOG = logging.getLogger(__name__)  # `pytest --log-cli-level=INFO` shows the numbers
STEPS = 6
# Of the largest latent. Sums of a convolution depend on the batch size: 1e-6 at most was measured.
TOLERANCE = 1e-5
_NAME = str.maketrans(":/", "__")
FULL = (0, 1, 6, 7)  # of twelve calls, one sampler step in three
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2


@pytest.fixture(scope="module", autouse=True)
def _few_values() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.compress.quantize.step_sketch.VALUES_PER_STEP", 2048)
        yield


@dataclasses.dataclass(frozen=True)
class Life:
    """A pipeline, its trajectories, and what recipes make of it."""

    small: Any
    recorded: CalibrationSet
    compressed: Callable[[str], CompressedPipeline]

    def float_latents(self) -> Tensor:
        return latents(self.small, functools.partial(self.small.pipe, num_inference_steps=STEPS))

    def latents(self, recipe: str) -> Tensor:
        return latents(self.small, self.compressed(recipe))


def latents(small: Any, run: Callable[..., Any], first_seed: int = 0) -> Tensor:
    """Of two samples; decoded they would be snapped to a codebook, which hides what differs a little."""
    seeds = [torch.Generator().manual_seed(first_seed + index) for index in range(2)]
    drawn: Tensor = run(generator=seeds, output_type="latent", **small.inputs).images
    return drawn


def changed(small: Any, **settings: Any) -> Any:
    """The same with other components or settings."""
    arguments = {**small.pipe.components, "unconditional_label": small.pipe.config.unconditional_label}
    pipe = ClassConditionalLDMPipeline(**{**arguments, **settings})
    pipe.set_progress_bar_config(disable=True)
    return type(small)(pipe, small.inputs)


def life(small: Any, root: Path) -> Life:
    recorded = small.collect(root / "set", steps=STEPS, batches=2)

    @functools.cache
    def compressed(recipe: str) -> CompressedPipeline:
        plain = recipe.partition("+")[0]
        reuse = compressed(plain) if plain != recipe and plain.startswith("w") else None
        return compress.apply(small.pipe, recorded, recipe, root / recipe.translate(_NAME), reuse=reuse)

    return Life(small, recorded, compressed)


@pytest.fixture(scope="module")
def doubled(small_pipeline: Build, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Guidance in one call with both halves."""
    return life(small_pipeline("ldm labels vq"), tmp_path_factory.mktemp("doubled"))


@pytest.fixture(scope="module")
def split(small_pipeline: Build, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The same network, and a call for each half."""
    small = changed(small_pipeline("ldm labels vq"), splits_guidance=True)
    return life(small, tmp_path_factory.mktemp("split"))


def mixed(compressed: CompressedPipeline) -> CompressedPipeline:
    """The same with a schedule that knows of one stream only: every cached call reads the latest feature."""
    compression = compressed.compression
    schedule = dataclasses.replace(compression.schedule, calls_per_step=1)
    compression = dataclasses.replace(compression, schedule=schedule)
    return CompressedPipeline(compressed.float_pipe, compression, compressed.path)


def psnr(found: Tensor, expected: Tensor) -> float:
    """In dB, against the range of what is expected."""
    spread = expected.max() - expected.min()
    return float(10 * torch.log10(spread.square() / (found - expected).square().mean()))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["ldm labels vq", "ldm context kl"])
def test_both_ways_draw_the_same_in_half_the_rows(name: str, small_pipeline: Build) -> None:
    small = small_pipeline(name)
    halved = changed(small, splits_guidance=True)
    rows: dict[str, list[int]] = {}
    drawn = {}
    for title, one in (("doubled", small), ("split", halved)):
        sizes = rows.setdefault(title, [])
        handle = one.pipe.unet.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
        drawn[title] = latents(one, functools.partial(one.pipe, num_inference_steps=STEPS))
        handle.remove()
    assert rows == {"doubled": [4] * STEPS, "split": [2] * (2 * STEPS)}
    assert distance(drawn["split"], drawn["doubled"]) < TOLERANCE
    unguided = type(small)(halved.pipe, {**halved.inputs, "guidance_scale": 1.0})
    assert distance(
        latents(unguided, functools.partial(halved.pipe, num_inference_steps=STEPS)), drawn["split"]
    ) > (10 * TOLERANCE)


def test_the_recording_knows_the_calls_of_a_step(doubled: Life, split: Life) -> None:
    assert (doubled.recorded.num_steps, doubled.recorded.rows_per_sample) == (STEPS, 2)
    assert (split.recorded.num_steps, split.recorded.rows_per_sample) == (2 * STEPS, 1)
    assert (doubled.recorded.calls_per_step, split.recorded.calls_per_step) == (1, 2)
    for step in range(STEPS):
        both = next(doubled.recorded.batches(step))
        halves = [next(split.recorded.batches(2 * step + stream)) for stream in range(2)]
        assert torch.equal(
            torch.cat([half.cond["class_labels"] for half in halves]), both.cond["class_labels"]
        )
        assert distance(torch.cat([half.sample for half in halves]), both.sample) < TOLERANCE


@pytest.mark.parametrize(
    "make", [functools.partial(PNDMScheduler, skip_prk_steps=True), HeunDiscreteScheduler]
)
def test_under_a_sampler_that_comes_back_to_a_timestep(
    make: Callable[[], Any], small_pipeline: Build, tmp_path: Path
) -> None:
    small, scheduler, recipe = small_pipeline("ldm labels vq"), make(), "cachequant-2:correction=false"
    drawn = []
    for is_split in (False, True):
        one = changed(small, scheduler=scheduler, splits_guidance=is_split)
        recorded = one.collect(tmp_path / f"set {is_split}", steps=4)
        assert recorded.calls_per_step == 1 + is_split
        compressed = compress.apply(one.pipe, recorded, recipe, tmp_path / f"compressed {is_split}")
        drawn.append(latents(one, compressed))
    assert distance(*drawn) < TOLERANCE
    assert distance(latents(one, mixed(compressed)), drawn[0]) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "recipe",
    [
        "deepcache-3",
        "deepcache-3:branch=3",
        "deepcache-2:spacing=power",
        "deepcache:steps=0/1/4",
        "cachequant-2:correction=false",
    ],
)
def test_a_cached_run_is_that_of_the_doubled_batch(recipe: str, doubled: Life, split: Life) -> None:
    one, two = doubled.compressed(recipe), split.compressed(recipe)
    steps = one.schedule.full_steps
    assert two.schedule.full_steps == tuple(2 * step + stream for step in steps for stream in range(2))
    assert two.schedule.calls_per_step == 2
    expected = doubled.latents(recipe)
    right = distance(split.latents(recipe), expected)
    wrong = distance(latents(split.small, mixed(two)), expected)
    uncached = distance(doubled.float_latents(), expected)
    LOG.info("%s: %.1e, mixed %.1e, without a cache %.1e", recipe, right, wrong, uncached)
    assert right < TOLERANCE
    assert wrong > 10 * TOLERANCE
    assert uncached > 10 * TOLERANCE


@pytest.mark.parametrize("corrected_by", [None, "iec"])
@torch.no_grad()
def test_each_stream_is_corrected_from_its_own_feature(corrected_by: str | None, split: Life) -> None:
    """The cache part by hand: mean and standard deviation of every channel of the float features.

    What IEC leaves is the feature at the input of the next sampler step.
    """
    option = "" if corrected_by is None else f",corrected_by={corrected_by}"
    compressed = split.compressed(f"cachequant-3:search=uniform{option}")
    assert compressed.schedule.full_steps == FULL
    table, model = compressed.compression.table, BranchedUNet(copy.deepcopy(split.small.pipe.unet))

    def feature(call: int, at: int) -> Tensor:
        """`(channels, values)` of that call at the input of another one."""
        kept = []
        for record, other in zip(split.recorded.batches(call), split.recorded.batches(at), strict=True):
            time = float(record.timestep)
            _, found = model.full(other.sample, time, record.cond, branch=compressed.schedule.branch)
            assert found is not None
            kept.append(found)
        return torch.cat(kept).movedim(1, 0).flatten(1).double()

    for call in range(2 * STEPS):
        gain, shift = (table[f"cache.{name}"][call].double() for name in ("gain", "shift"))
        if call in FULL:
            assert torch.equal(gain, torch.ones_like(gain))
            assert not shift.any()
            continue
        wanted, start = feature(call, call), call // 6 * 6
        right, wrong = (
            feature(start + stream, start + stream + 2 * (corrected_by is not None))
            for stream in (call % 2, (call + 1) % 2)
        )
        torch.testing.assert_close(gain, wanted.std(1) / right.std(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shift, wanted.mean(1) - gain * right.mean(1), rtol=1e-4, atol=1e-4)
        assert (gain - wanted.std(1) / wrong.std(1)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("w8a8", 49.0),
        ("w8a8+deepcache-3", 32.0),
        ("w8a8+cachequant-3", 32.0),
        ("w8a8+cachequant-3:corrected_by=iec", 32.0),
    ],
)
def test_an_artifact_draws_what_the_doubled_batch_draws(
    recipe: str, bound: float, doubled: Life, split: Life, tmp_path: Path
) -> None:
    compressed = compress.load(split.compressed(recipe).path)
    deployed = deploy.load(deploy.export(compressed, tmp_path / "artifact"))
    deployed.pipe.set_progress_bar_config(disable=True)
    assert isinstance(deployed.pipe, ClassConditionalLDMPipeline)
    assert deployed.pipe.splits_guidance
    assert deployed.schedule == compressed.schedule
    expected = doubled.float_latents()
    found = latents(split.small, deployed)
    right, of_one_call = (psnr(one, expected) for one in (found, doubled.latents(recipe)))
    other_seed = psnr(latents(split.small, deployed, 7), expected)
    LOG.info("%s: %.1f dB, in one call %.1f, another seed %.1f", recipe, right, of_one_call, other_seed)
    assert right > bound
    assert right > of_one_call - 2
    assert other_seed < 20


def test_what_an_artifact_says(doubled: Life, split: Life, tmp_path: Path) -> None:
    """A pipeline with doubled batches has the same bytes as before there was a choice."""
    said = {}
    for name, one in (("doubled", doubled), ("split", split)):
        root = deploy.export(one.compressed("deepcache-3"), tmp_path / name)
        said[name] = json.loads((root / "errata.json").read_text())["schedule"]
        index = json.loads((root / "model_index.json").read_text())
        assert index.get("splits_guidance") == (True if name == "split" else None)
    assert said["doubled"] == {"branch": 1, "full_steps": [0, 3], "num_steps": STEPS}
    assert said["split"] == {"branch": 1, "calls_per_step": 2, "full_steps": [*FULL], "num_steps": 2 * STEPS}
    assert "6 steps of 2 calls (4 cached)" in deploy.verify(tmp_path / "split").summary()
    assert "6 steps (4 cached)" in deploy.verify(tmp_path / "doubled").summary()


def rewrite(root: Path, **changes: Any) -> None:
    """Alters the schedule as an attacker would: with a digest that matches again."""
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    value["schedule"] |= changes
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("split", {"calls_per_step": 1}, "its schedule would be written as"),
        (
            "split",
            {"calls_per_step": 3},
            "leaves out call 2, but the 3 calls of a sampler step are full together",
        ),
        ("split", {"calls_per_step": 5}, "12 denoiser calls do not make whole sampler steps"),
        ("split", {"calls_per_step": 2.0}, "calls_per_step=2.0; allowed are whole numbers"),
        ("split", {"full_steps": [0, 1, 6]}, "leaves out call 7, but the 2 calls of a sampler step"),
        ("doubled", {"calls_per_step": 3, "full_steps": [0, 1, 2]}, "1 denoiser calls in each sampler step"),
    ],
)
def test_schedules_that_do_not_fit_the_timesteps(
    name: str, changes: dict[str, Any], message: str, doubled: Life, split: Life, tmp_path: Path
) -> None:
    one = {"doubled": doubled, "split": split}[name]
    root = deploy.export(one.compressed("deepcache-3"), tmp_path / "artifact")
    rewrite(root, **changes)
    with pytest.raises(ArtifactCorruptError, match=message):
        deploy.verify(root)


def test_a_cache_that_mixes_the_streams_is_not_exported_but_an_older_one_without_a_cache_is(
    split: Life, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactCorruptError, match="calls_per_step=1: a cached call would read the feature"):
        deploy.export(mixed(split.compressed("deepcache-3")), tmp_path / "mixed")
    root = deploy.export(mixed(split.compressed("w8a8")), tmp_path / "uncached")
    assert deploy.verify(root).schedule == CacheSchedule.uncached(2 * STEPS)


def test_requests_that_a_run_of_two_calls_cannot_serve(split: Life) -> None:
    compressed = split.compressed("deepcache-3")
    unguided = type(split.small)(split.small.pipe, {**split.small.inputs, "guidance_scale": 1.0})
    message = r"step 1 is at timestep .*, and with guidance: 2 calls a step were recorded"
    with pytest.raises(ArtifactMismatchError, match=message):
        latents(unguided, compressed)
    message = "step 6 is beyond the run of sampler steps, 2 denoiser calls each; its last step is 5"
    with pytest.raises(RecipeError, match=message):
        compress.apply(
            split.small.pipe, split.recorded, "deepcache:steps=0/1/6", split.recorded.path.parent / "beyond"
        )


def test_folders_keep_the_setting_and_those_without_it_stay_as_they_were(
    doubled: Life, split: Life, tmp_path: Path
) -> None:
    for one, is_split in ((doubled, False), (split, True)):
        folder = tmp_path / str(is_split)
        one.small.pipe.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert ("splits_guidance" in index) is is_split
        opened: Any = calibration.load_pipeline(folder)
        assert opened.splits_guidance is is_split
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="splits_guidance is 'yes'; allowed are True and False"):
        changed(split.small, splits_guidance="yes")


def test_distances_of_the_search_are_summed_over_the_streams(doubled: Life, split: Life) -> None:
    one, two = (
        feature_distances(life.small.pipe.unet, life.recorded, branch=1, interval=3)
        for life in (doubled, split)
    )
    assert one.shape == (STEPS, 6)
    assert (one[:5, 1] > 0).all()
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "text", "schedule"),
    [
        ("w8a8", "none", list(range(12))),
        ("deepcache-3", "FFccccFFcccc (1 of the up path's resnets recomputed)", [*FULL]),
        (
            "cachequant-5:search=uniform",
            "FFccccccccFF (1 of the up path's resnets recomputed)",
            [0, 1, 10, 11],
        ),
        (
            "cachequant-4",
            "searched on the trajectories: 2 of 6 steps full (1 of the up path's resnets recomputed)",
            "searched",
        ),
    ],
)
def test_a_preview_counts_as_the_result_does(recipe: str, text: str, schedule: Any, split: Life) -> None:
    recorded = split.recorded
    preview = Preview.of(
        split.small.pipe,
        Recipe.named(recipe),
        num_steps=recorded.num_steps,
        calls_per_step=recorded.calls_per_step,
    )
    assert preview.cache_text() == text
    assert preview.to_json()["schedule"] == schedule
    if recipe == "deepcache-3":
        assert preview.schedule == split.compressed(recipe).schedule


def test_the_command_counts_as_the_result_does(
    split: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split.small.pipe.save_pretrained(tmp_path / "pipeline")
    options = ["--calibration", str(split.recorded.path), "--recipe", "deepcache-3", "--dry-run"]
    assert cli.main(["compress", str(tmp_path / "pipeline"), *options]) == 0
    assert "FFccccFFcccc" in capsys.readouterr().out


def test_few_rows_for_a_correction_are_of_both_streams(doubled: Life, split: Life) -> None:
    """Every second call alone would be the unconditional one each time."""

    def steps(recorded: CalibrationSet, samples: int) -> list[int]:
        rows = mixed_rows(recorded, samples=samples, batch_size=4)
        return list(dict.fromkeys(torch.cat([batch.steps for batch in rows]).tolist()))

    assert steps(split.recorded, 6) == [0, 3, 4, 7, 8, 11]
    assert steps(split.recorded, 9) == [0, 1, 2, 4, 5, 7, 8, 9, 10]
    assert steps(split.recorded, 100) == list(range(12))
    assert steps(doubled.recorded, 3) == [0, 2, 4]
