"""The errors that errata raises on purpose, as one tree.

    ErrataError
    ├── CalibrationError       a pipeline cannot be calibrated, or a calibration set cannot be used
    ├── RecipeError            a recipe is unknown, malformed, or does not fit the model
    ├── ArtifactError          an artifact cannot be written, opened or run
    │   ├── ArtifactCorruptError   its bytes are not the ones that its manifest promises
    │   ├── ArtifactVersionError   its format is one that this release does not read
    │   └── ArtifactMismatchError  it was made for another machine, sampler or number of steps
    ├── PlanError              a correction plan is malformed, or cannot serve this artifact
    └── ReportError            a report cannot be measured or written

Every message names the thing at fault, the value received, what was allowed, and the next action.
"""

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
]


class ErrataError(Exception):
    """Base of every error that errata raises on purpose."""


class CalibrationError(ErrataError):
    """A pipeline cannot be calibrated, or a calibration set cannot be used."""


class RecipeError(ErrataError):
    """A recipe is unknown, malformed, or does not fit the model."""


class ArtifactError(ErrataError):
    """An artifact cannot be written, opened or run."""


class ArtifactCorruptError(ArtifactError):
    """An artifact's bytes are not the ones that its manifest promises."""


ArtifactCorrupt = ArtifactCorruptError
"""The name of releases up to 0.1."""


class ArtifactVersionError(ArtifactError):
    """An artifact's format version is one that this release does not read."""


class ArtifactMismatchError(ArtifactError):
    """An artifact was made for another machine, sampler or number of steps than it is asked to serve."""


ArtifactMismatch = ArtifactMismatchError
"""The name of releases up to 0.1."""


class PlanError(ErrataError):
    """A correction plan is malformed, or cannot serve this artifact."""


class ErrataWarning(UserWarning):
    """What was measured does not hold for this use; the command shows it on stderr."""


class ReportError(ErrataError):
    """A report cannot be measured or written."""


def first_line(problem: BaseException) -> str:
    """Return another library's error in one line, for a message of ours; its type if it says nothing."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]
