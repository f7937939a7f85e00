"""Write pages about every public name, from the docstrings: `make docs`.

    python scripts/make_docs.py --out docs/api

One page for each package in `PACKAGES`, with exactly the names of its `__all__`. Warnings are errors: a type
that cannot be resolved, or a docstring that cannot be read, is a mistake in the source.
"""

import argparse
import importlib
import importlib.metadata
import warnings
from pathlib import Path

import pdoc
import pdoc.render

from errata import quiet

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "errata",
    "errata.calibration",
    "errata.compress",
    "errata.deploy",
    "errata.correct",
    "errata.quality",
    "errata.report",
)


def build(out: Path) -> None:
    """Writes the pages into `out`; other files there are left alone."""
    # Of each package its own page: what is public in its files is imported there.
    specs = [spec for package in PACKAGES for spec in (package, rf"!{package}\.")]
    version = importlib.metadata.version("errata")
    pdoc.render.configure(
        docformat="google",
        footer_text=f"errata {version}",
        template_directory=Path(__file__).with_name("docs_templates"),
    )
    with quiet.without_notices():
        for package in PACKAGES:
            importlib.import_module(package)  # other people's packages may warn while they are imported
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*specs, output_directory=out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the reference of all public names.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "api", metavar="DIR")
    out = parser.parse_args().out
    build(out)
    print(f"the reference is in {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
