"""What commands import, in processes of their own: each only what it needs, and nothing that chatters."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from errata.cli.startup import lean_imports, unused_packages
from errata.correct import IEC, Plan

HEAVY = {"brevitas", "datasets", "diffusers", "peft", "scipy", "torch", "torchao", "transformers"}
# The command as its script runs it; then what it has imported, on the last line.
COMMAND = """
import json, sys
from errata.cli import main
status = main()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(status)
"""


def run(*arguments: object) -> tuple[set[str], str]:
    """Return the packages that a command imported, and what it wrote to stderr."""
    words = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8+cachequant-3"])
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_checking_an_artifact_needs_neither_torch_nor_diffusers(
    command: str, recipe: str, tiny_artifact: Callable[[str], Path]
) -> None:
    imported, told = run(command, tiny_artifact(recipe))
    assert imported & HEAVY == set()
    assert told == ""


def test_help_needs_nothing() -> None:
    done = [sys.executable, "-X", "importtime", "-m", "errata.cli", "generate", "--help"]
    told = subprocess.run(done, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert "errata" in imported
    assert imported & (HEAVY | {"numpy"}) == set()


def test_generate_imports_what_its_artifact_uses(
    tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    imported, told = run("generate", tiny_artifact("w8a8"), "--images", 1, "--out", tmp_path / "images")
    assert imported & HEAVY == {"diffusers", "torch"}
    assert told == ""


def write(root: Path, pipeline: str, **scheduler: object) -> Path:
    (root / "scheduler").mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return root


def test_a_plan_needs_nothing_that_makes_pipelines(tmp_path: Path) -> None:
    Plan(IEC(), "all").save(tmp_path / "plan.json")
    imported, told = run("verify", tmp_path / "plan.json")
    assert imported & HEAVY == {"diffusers", "torch"}
    assert told == ""


def test_what_is_hidden_depends_on_the_artifact(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", "DDPMPipeline", _class_name="DDPMScheduler", beta_end=0.02)
    assert set(unused_packages(plain)) == {"peft", "scipy", "torchao", "transformers"}
    text = write(tmp_path / "text", "StableDiffusionPipeline", _class_name="DDPMScheduler")
    betas = write(
        tmp_path / "betas", "DDPMPipeline", _class_name="EulerDiscreteScheduler", use_beta_sigmas=True
    )
    assert set(unused_packages(None)) == set(unused_packages(plain))
    for other in (text, betas, tmp_path / "missing"):
        assert set(unused_packages(other)) == {"peft", "torchao"}


def test_a_broken_index_hides_no_more(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    assert set(unused_packages(tmp_path)) == {"peft", "torchao"}


def test_a_process_of_someone_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "diffusers")
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with lean_imports(Namespace(has_own_process=False), tmp_path):
        assert "peft" not in sys.modules  # where it is hidden, it is there as None
