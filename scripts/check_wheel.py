"""Prove that the wheel holds exactly the stage folders, and works where the checkout is not.

The checkout shows the stages as bare folders and `setup.py` maps them onto `errata`, so an editable
install can work while a wheel lacks a file or drops a folder called `deploy` into site-packages. This
builds the wheel from a clean export of HEAD, compares file lists, installs it into an empty
environment that borrows only the dependencies, and uses it from another directory.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = {"core": "errata"} | {stage: f"errata/{stage}" for stage in STAGES}
SMOKE_TEST = """
import importlib, pathlib, sys

here = pathlib.Path(sys.prefix).resolve()
stages = ("runtime", "calibration", "compress", "deploy", "correct", "report")
for name in ("errata", "errata.cli", "errata.embedded", *(f"errata.{stage}" for stage in stages)):
    module = importlib.import_module(name)
    assert here in pathlib.Path(module.__file__).resolve().parents, f"{module.__file__} is not the wheel's"
for bare in ("core", *stages):
    assert importlib.util.find_spec(bare) is None, f"a bare package {bare} is importable"

from diffusers import DiffusionPipeline
from errata.embedded import PIPELINE

pipe = DiffusionPipeline.from_pretrained(PIPELINE)
pipe.set_progress_bar_config(disable=True)
pipe(batch_size=1, num_inference_steps=2)
"""


class CheckFailedError(Exception):
    """The wheel is not what it should be."""


def export(tree: Path) -> None:
    """Write the committed files to `tree`; in an unpacked archive, which has no commits, the files."""
    head = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=ROOT, capture_output=True)
    if head.returncode == 0 and (ROOT / ".git").exists():
        archive = tree.with_suffix(".tar")
        run(["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT)
        shutil.unpack_archive(archive, tree, filter="data")
        if run(["git", "status", "--porcelain"], cwd=ROOT):
            print("note: uncommitted changes are not part of this check")
        return
    ignored = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".typecheck",
        "__pycache__",
        "*.pyc",
        "*.egg-info",
        "build",
        "dist",
        "runs",
        ".*_cache",
    )
    shutil.copytree(ROOT, tree, ignore=ignored)


def run(command: list[str], cwd: Path) -> str:
    """Run a command away from the checkout's influence; return what it said, or fail with it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise CheckFailedError(f"`{' '.join(command[:4])} ...` failed:\n{done.stdout}")
    return done.stdout


def build_wheel(tree: Path, folder: Path) -> Path:
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)],
        folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def compare(tree: Path, wheel: Path) -> int:
    """Fail unless the wheel holds every file of the folders and nothing else; return how many."""
    expected = {
        f"{package}/{path.relative_to(tree / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    complaints = [
        *(f"not in the wheel (a pattern missing in pyproject.toml?): {name}" for name in expected - found),
        *(f"in the wheel, but in no folder: {name}" for name in found - expected),
    ]
    if complaints:
        raise CheckFailedError("\n".join(sorted(complaints)))
    return len(found)


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel alone; return the folder of its programs.

    The dependencies come from the running environment through a `.pth` line. Its own `.pth` files are
    not read that way, so an editable install of errata there stays out of sight.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], environment.parent)
    bin_folder = Path(sysconfig.get_path("scripts", "venv", {"base": str(environment)}))
    python = str(bin_folder / "python")
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment).strip()
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "dependencies.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], environment)
    return bin_folder


def use(programs: Path, elsewhere: Path) -> None:
    for option in ("--version", "--help"):
        if "errata" not in run([str(programs / "errata"), option], elsewhere):
            raise CheckFailedError(f"`errata {option}` does not name errata")
    (elsewhere / "smoke_test.py").write_text(SMOKE_TEST)
    run([str(programs / "python"), "smoke_test.py"], elsewhere)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="errata-wheel-") as name:
        folder = Path(name).resolve()
        for child in ("dist", "elsewhere", "environment"):
            (folder / child).mkdir()
        try:
            export(folder / "tree")
            wheel = build_wheel(folder / "tree", folder / "dist")
            count = compare(folder / "tree", wheel)
            use(install(wheel, folder / "environment"), folder / "elsewhere")
        except CheckFailedError as failure:
            print(f"check_wheel: error: {failure}", file=sys.stderr)
            return 1
        print(f"{wheel.name}: {count} files, {wheel.stat().st_size / 1e6:.1f} MB, works outside the checkout")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
