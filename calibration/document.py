"""`calibration.json`: the request, the denoiser calls and the shards of a set; how it is read and filled."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from errata import canonical_json
from errata.calibration.entries import build, check_keys
from errata.calibration.given import Given
from errata.calibration.recorder import Trajectory
from errata.calibration.shards import FOLDER, Shard, shard_name, write_shard
from errata.errors import CalibrationError
from errata.journal import Journal
from errata.journal_rules import JournalRules
from errata.request_differences import differences

__all__ = [
    "FINISHED",
    "FORMAT",
    "PARTIAL",
    "RULES",
    "Calls",
    "Document",
    "Recording",
    "Request",
    "check_is_open",
    "check_same_calls",
    "write_fitting",
]

FINISHED = "calibration.json"
PARTIAL = "calibration.partial.json"
FORMAT = "errata-calibration/1"
RULES = JournalRules(
    work="an unfinished calibration",
    format=FORMAT,
    error=CalibrationError,
    request=PARTIAL,
    lock=".lock",
    items=FOLDER,
    logger="errata.calibration",
    notes={"calls": None, "shards": []},
)
_FAMILY = FORMAT.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the bytes of a calibration set; two equal requests give equal sets.

    `scheduler_config` is plain JSON. `fingerprint` is that of the float UNet, `prompts` the digest of the
    prompts in use, `takes_inputs` says whether further pipeline arguments came with every sample-batch.
    """

    pipeline_class: str
    unet_class: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    fingerprint: str
    num_inference_steps: int
    num_samples: int
    batch_size: int
    seed: int
    guidance_scale: float | None
    prompts: str | None
    takes_inputs: bool
    device: str
    versions: dict[str, str]

    def batch_sizes(self) -> list[int]:
        """Return the samples of each sample-batch; the last one has what is left."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return [self.batch_size] * full + [rest] * bool(rest)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The denoiser calls that every trajectory of the set shares.

    Args:
        timesteps: the timestep of each call, in order; a sampler may repeat one.
        timestep_dtype: of the tensor that was passed, as `"int64"`.
        rows_per_sample: batch rows per sample, 2 with classifier-free guidance.
        sample_shape: (C, H, W) of the denoiser's input.
        sample_dtype: of the denoiser's input.
        cond: names of its other arguments, sorted.
    """

    timesteps: tuple[float, ...]
    timestep_dtype: str
    rows_per_sample: int
    sample_shape: tuple[int, ...]
    sample_dtype: str
    cond: tuple[str, ...]

    @classmethod
    def of(cls, trajectory: Trajectory, num_samples: int, index: int) -> "Calls":
        """Return what a trajectory of sample-batch `index`, of `num_samples` samples, shows of them.

        Raises:
            CalibrationError: its batch rows are not a multiple of the samples.
        """
        rows_per_sample, odd_rows = divmod(trajectory.num_rows, num_samples)
        if odd_rows or not rows_per_sample:
            raise CalibrationError(
                f"the UNet got {trajectory.num_rows} rows for sample-batch {index} of {num_samples} samples; "
                f"the pipeline arguments of a sample-batch must describe exactly {num_samples}"
            )
        return cls(
            timesteps=tuple(trajectory.timestep.tolist()),
            timestep_dtype=str(trajectory.timestep.dtype).removeprefix("torch."),
            rows_per_sample=rows_per_sample,
            sample_shape=tuple(trajectory.sample.shape[2:]),
            sample_dtype=str(trajectory.sample.dtype).removeprefix("torch."),
            cond=tuple(sorted(trajectory.cond)),
        )


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole file; `calls` is None while there is no shard. Shard i holds sample-batch i."""

    request: Request
    calls: Calls | None = None
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Read `calibration.json` or its partial form.

        Raises:
            CalibrationError: no calibration, of another version, or with missing, unknown or odd entries.
        """
        try:
            content = canonical_json.loads_strict(path.read_bytes())
        except (OSError, ValueError) as problem:
            raise CalibrationError(
                f"`{path}` cannot be read as JSON ({problem}); calibrate again"
            ) from problem
        _check_format(path, content)
        del content["format"]
        return _parse(path, content)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Document":
        """Return the document of a file's entries, without its format.

        Raises:
            ValueError: an entry is missing, unknown, or of another type.
        """
        check_keys(content, {field.name for field in dataclasses.fields(cls)}, "the file")
        calls = content["calls"]
        document = cls(
            request=build(Request, content["request"], "request"),
            calls=None if calls is None else build(Calls, calls, "calls"),
            shards=tuple(build(Shard, shard, "a shard") for shard in content["shards"]),
        )
        if document.calls and not all(type(t) in (int, float) for t in document.calls.timesteps):
            raise ValueError(f"its timesteps are {document.calls.timesteps}")
        names = [shard.file for shard in document.shards]
        if names != [shard_name(index) for index in range(len(names))]:
            raise ValueError(f"its shards are named {names}")
        if [shard.num_samples for shard in document.shards] != document.request.batch_sizes()[: len(names)]:
            raise ValueError("its shards do not hold the sample-batches of the request")
        if bool(document.shards) != (document.calls is not None):
            raise ValueError("it has shards without calls, or calls without shards")
        return document


class Recording:
    """A calibration set while it is being filled; a context manager.

    The request file is `calibration.partial.json`, which is rewritten after every shard and renamed to
    `calibration.json` after the last.

    Raises:
        CalibrationError: `out` holds a finished calibration, other files or another request, another process
            is at work there, or it cannot be written.
    """

    def __init__(self, out: Path, request: Request) -> None:
        self._out = out
        self._request = request
        self._journal = Journal(out, dataclasses.asdict(request), RULES, check_place=self._check_place)
        self._calls: Calls | None = None
        self._shards: dict[int, Shard] = {}

    def __enter__(self) -> Self:
        self._journal.__enter__()
        try:
            found = _parse(self._out / PARTIAL, self._journal.notes | {"request": self._journal.request})
            self._shards = {
                index: shard for index, shard in enumerate(found.shards) if shard.is_intact(self._out)
            }
            self._calls = found.calls if self._shards else None
            self._save()
        except BaseException:
            self._journal.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    @property
    def calls(self) -> Calls | None:
        """What all trajectories share; None while there is no shard."""
        return self._calls

    def shard(self, index: int) -> Shard | None:
        """Return the finished, intact shard of that sample-batch."""
        return self._shards.get(index)

    def add(self, index: int, trajectory: Trajectory, *, num_samples: int, given: Given) -> None:
        """Write the shard of a sample-batch.

        Raises:
            CalibrationError: its calls are not those of the other shards, or it cannot be written.
        """
        self._calls, self._shards[index] = write_fitting(
            self._journal, index, trajectory, known=self._calls, num_samples=num_samples, given=given
        )
        self._save()

    def finish(self) -> None:
        """Declare the set complete."""
        self._journal.finish(FINISHED)

    def _save(self) -> None:
        # Resumed work can have a gap, where a shard was damaged; what follows it counts once it is closed.
        finished: list[Shard] = []
        while (index := len(finished)) in self._shards:
            finished.append(self._shards[index])
        document = Document(
            request=self._request, calls=self._calls if finished else None, shards=tuple(finished)
        )
        content = dataclasses.asdict(document)
        self._journal.note(calls=content["calls"], shards=content["shards"])

    def _check_place(self) -> None:
        check_is_open(self._out)


def write_fitting(
    journal: Journal,
    index: int,
    trajectory: Trajectory,
    *,
    known: Calls | None,
    num_samples: int,
    given: Given,
) -> tuple[Calls, Shard]:
    """Write the shard of a sample-batch that made the calls that are known; return them and the shard.

    Raises:
        CalibrationError: it made others, or it cannot be written.
    """
    calls = Calls.of(trajectory, num_samples, index)
    check_same_calls(known, calls, index)
    with journal.refusals():
        shard = write_shard(journal, index, trajectory, num_samples=num_samples, inputs=given.digest)
    return calls, shard


def check_is_open(out: Path) -> None:
    """Check that a calibration can be begun or continued in a directory.

    Raises:
        CalibrationError: it is no directory, or holds a finished calibration.
    """
    if out.exists() and not out.is_dir():
        raise CalibrationError(f"`{out}` exists and is not a directory; choose another directory")
    if (out / FINISHED).exists():
        raise CalibrationError(
            f"`{out}` holds a finished calibration; use it with `errata compress` or "
            "errata.calibration.load, or choose another directory"
        )


def check_same_calls(known: Calls | None, calls: Calls, index: int) -> None:
    """Check that sample-batch `index` made the same calls as the others.

    Raises:
        CalibrationError: it made others.
    """
    if known is not None and calls != known:
        changed = differences(dataclasses.asdict(known), dataclasses.asdict(calls))
        raise CalibrationError(
            f"sample-batch {index} made other UNet calls than the ones before it ({'; '.join(changed)}); "
            "all trajectories of a set must take the same steps: use the same inputs for all"
        )


def _parse(path: Path, content: dict[str, Any]) -> Document:
    try:
        return Document.from_json(content)
    except (TypeError, ValueError, AttributeError) as problem:
        raise CalibrationError(f"`{path}` is damaged: {problem}; calibrate again") from problem


def _check_format(path: Path, content: Any) -> None:
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or name.partition("/")[0] != _FAMILY:
        raise CalibrationError(f"`{path}` is not a calibration set: its format is {name!r}, not {FORMAT!r}")
    if name != FORMAT:
        raise CalibrationError(
            f"`{path}` has format version {name!r}; this release reads {FORMAT!r}; calibrate again, or use "
            "the release that wrote it"
        )
