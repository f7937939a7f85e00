"""Errata compresses a diffusion model, freezes it, and corrects its sampling errors while it runs.

The stages, in the order in which data flows: `errata.calibration`, `errata.compress`, `errata.deploy`,
`errata.correct`, `errata.report`. `errata.quality` measures how good images are. Importing `errata` alone
imports none of them, and not torch either.
"""

from importlib.metadata import PackageNotFoundError, version

from errata import quiet as quiet
from errata import renamed as renamed
from errata.errors import (
    ArtifactCorrupt as ArtifactCorrupt,
)
from errata.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMismatchError,
    ArtifactVersionError,
    CalibrationError,
    ErrataError,
    PlanError,
    RecipeError,
    ReportError,
)
from errata.errors import (
    ArtifactMismatch as ArtifactMismatch,
)

__all__ = [
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactMismatchError",
    "ArtifactVersionError",
    "CalibrationError",
    "ErrataError",
    "PlanError",
    "RecipeError",
    "ReportError",
    "__version__",
]

__version__: str
"""Of the installed package."""

renamed.install()
quiet.mute()

try:
    __version__ = version("errata")
except PackageNotFoundError:  # the folders are on the path, but nothing was installed
    __version__ = "0+unknown"
