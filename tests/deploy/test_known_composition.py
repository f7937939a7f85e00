"""What `verify` takes without diffusers is what diffusers takes; of the rest it says nothing."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from errata import deploy
from errata.canonical_json import digest, dumps, file_digest, loads_strict
from errata.deploy import full_check, verification
from errata.deploy.known_composition import (
    _SCHEDULERS,
    KNOWN_PIPELINES,
    is_known_composition,
    is_known_scheduler,
    known_unet,
)
from errata.deploy.manifest import MANIFEST_FILE, read_manifest
from errata.errors import ArtifactCorruptError

Artifact = Callable[[str], Path]
# For each kind of rule, values that it allows; and some that none or few allow.
TRIED: tuple[Any, ...] = (
    True, 0, 1, 7, 0.5, -1, 2, 10**7, float("nan"), None, "", "linear", "scaled_linear", "squaredcos_cap_v2",
    "epsilon", "sample", "v_prediction", "leading", "linspace", "trailing", "fixed_small", "fixed_small_log",
    "fixed_large", "fixed_large_log", "learned", "learned_range", [], {},
)  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_PIPELINES)
def test_a_known_pipeline_takes_a_unet_and_a_scheduler_alone(name: str) -> None:
    kind = getattr(diffusers, name)
    assert set(inspect.signature(kind.__init__).parameters) == {"self", "unet", "scheduler"}
    assert kind._optional_components == []


@pytest.mark.parametrize("name", _SCHEDULERS)
def test_a_known_scheduler_has_a_rule_for_each_setting(name: str) -> None:
    kind = getattr(diffusers, name)
    assert set(_SCHEDULERS[name]) == set(inspect.signature(kind.__init__).parameters) - {"self"}
    assert is_known_scheduler(json.loads(kind().to_json_string()))


@pytest.mark.parametrize("name", _SCHEDULERS)
def test_diffusers_makes_a_scheduler_of_all_that_is_allowed(name: str) -> None:
    kind, made = getattr(diffusers, name), 0
    for setting in _SCHEDULERS[name]:
        for value in TRIED:
            if is_known_scheduler({"_class_name": name, setting: value}):
                kind.from_config({"_class_name": name, setting: value})
                made += 1
    assert made > len(_SCHEDULERS[name])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"_class_name": "EulerDiscreteScheduler"},
        {"_class_name": ["DDIMScheduler"]},
        {"_class_name": "DDIMScheduler", "unknown": None},
        {"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"},
        {"_class_name": "DDIMScheduler", "beta_start": -0.1},
        {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**7},
        {"_class_name": "DDIMScheduler", "num_train_timesteps": True},
        {"_class_name": "DDIMScheduler", "clip_sample": 1},
        {"_class_name": "DDIMScheduler", "trained_betas": [0.1]},
        {"_class_name": "DDIMScheduler", "variance_type": "fixed_small"},
    ],
    ids=str,
)
def test_other_schedulers_are_not_known(settings: dict[str, Any]) -> None:
    assert not is_known_scheduler(settings)


@pytest.mark.parametrize("recipe", ["w8a8", "w6a8", "w4a8", "deepcache-3", "w4a8+cachequant-3"])
def test_a_known_artifact_is_verified_without_diffusers(
    recipe: str, tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_artifact(recipe)
    manifest = read_manifest(root)
    full_check.check_contents(root, manifest)
    rows = verification.layer_rows(root, manifest)
    monkeypatch.setattr(full_check, "check_contents", refuse)
    assert deploy.verify(root) == manifest
    monkeypatch.setattr(verification, "known_unet", lambda *_: None)
    assert verification.layer_rows(root, manifest) == rows
    with pytest.raises(AssertionError, match="the full check was asked"):
        deploy.verify(root)


def refuse(*_: object) -> None:
    raise AssertionError("the full check was asked")


def altered(source: Path, folder: Path, name: str, *, whole: bool = False, **changes: object) -> Path:
    """A copy of an artifact with other settings in a file, these alone if `whole`, and a fitting manifest."""
    root = folder / "altered"
    shutil.copytree(source, root)
    kept = {} if whole else json.loads((root / name).read_bytes())
    (root / name).write_text(json.dumps(kept | changes))
    value = loads_strict((root / MANIFEST_FILE).read_bytes())
    value["files"][name] = {"bytes": (root / name).stat().st_size, "sha256": file_digest(root / name)}
    if name.startswith("scheduler/"):
        value["scheduler_config"] = json.loads((root / name).read_bytes())
    del value["manifest_sha256"]
    (root / MANIFEST_FILE).write_bytes(dumps({**value, "manifest_sha256": digest(value)}))
    return root


@pytest.mark.parametrize(
    ("name", "changes", "is_sound"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, True),
        ("unet/config.json", {"sample_size": [8, 8]}, True),
        ("unet/config.json", {"block_out_channels": [8, 12]}, False),
        ("unet/config.json", {"layers_per_block": 1}, False),
        ("unet/config.json", {"norm_num_groups": 3}, False),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 10}, True),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, False),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, True),
        ("unet/config.json", {"whole": True, "$float": "1"}, False),
        ("scheduler/scheduler_config.json", {"whole": True, "$float": "1"}, False),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, False),
        ("model_index.json", {"_class_name": "DDPMPipeline"}, False),
    ],
    ids=str,
)
def test_what_is_not_known_is_for_the_full_check(
    name: str, changes: dict[str, Any], is_sound: bool, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    root = altered(tiny_artifact("w8a8"), tmp_path, name, **changes)
    manifest = read_manifest(root)
    assert not verification._is_known_and_sound(root, manifest)
    if is_sound:
        assert deploy.verify(root) == manifest
    else:
        with pytest.raises(ArtifactCorruptError):
            deploy.verify(root)


def test_other_denoisers_are_not_known(tiny_artifact: Artifact) -> None:
    root = tiny_artifact("w8a8")
    manifest = read_manifest(root)
    assert known_unet(root, manifest) is not None
    assert is_known_composition(root, manifest)
    other = dataclasses.replace(manifest, unet_class="UNet2DConditionModel")
    assert known_unet(root, other) is None
    assert not is_known_composition(root, other)
