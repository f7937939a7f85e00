"""Show the stage folders to the type checker under the name that they are imported by.

mypy and pyright read `errata` from `.typecheck/errata/`, a folder of symlinks: one for each entry of
`core/` and one for each stage. `make lint` runs this first, so a new file in `core/` is never missed.

    python scripts/link_typecheck.py            # bring the links up to date
    python scripts/link_typecheck.py --check    # only say whether they are; exit status 1 if not
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / ".typecheck" / "errata"
STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")


def wanted_links(root: Path = ROOT) -> dict[str, str]:
    """Name of each link and what it points to, relative to the folder of links."""
    entries = [path for path in (root / "core").iterdir() if _is_for_the_checker(path)]
    links = {path.name: f"../../core/{path.name}" for path in entries}
    return links | {stage: f"../../{stage}" for stage in STAGES if (root / stage / "__init__.py").exists()}


def _is_for_the_checker(path: Path) -> bool:
    if path.is_dir():
        return (path / "__init__.py").exists()
    return path.suffix in {".py", ".pyi"} or path.name == "py.typed"


def present_links(folder: Path = LINKS) -> dict[str, str]:
    """Name and target of each entry of the folder; the target of what is no symlink is empty."""
    if not folder.is_dir():
        return {}
    return {path.name: str(path.readlink()) if path.is_symlink() else "" for path in folder.iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep .typecheck/errata/ complete.")
    parser.add_argument("--check", action="store_true", help="change nothing, only report")
    check = parser.parse_args().check

    wanted, present = wanted_links(), present_links()
    stale = sorted(name for name in present if present[name] != wanted.get(name))
    missing = sorted(name for name in wanted if present.get(name) != wanted[name])
    if check:
        for name in sorted({*stale, *missing}):
            print(f".typecheck/errata/{name} is {'stale' if name in stale else 'missing'}", file=sys.stderr)
        return 1 if stale or missing else 0

    LINKS.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (LINKS / name).unlink()
    for name in missing:
        (LINKS / name).symlink_to(wanted[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
