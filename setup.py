"""Maps the stage folders of the repository onto the package `errata`. All else is in pyproject.toml."""

from setuptools import find_packages, setup

STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = {"errata": "core"} | {f"errata.{stage}": stage for stage in STAGES}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{below}" for below in find_packages(folder)))
    ],
)
