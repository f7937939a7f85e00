"""A plan: which methods, at which steps; and plans as small JSON files.

A file is `{"format": "errata-plan/1", "plan": …}`. `plan` is what `Plan.to_json` returns: method, steps, the
artifact that it was chosen for, and what it was measured to be worth there.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.canonical_json import loads_strict
from errata.correct import steps as grammar
from errata.correct.config_json import fields_of
from errata.correct.corrector import Method
from errata.correct.methods.iec import IEC
from errata.correct.planner.expectation import Expectation
from errata.correct.registry import METHODS as METHODS
from errata.correct.registry import method_from_json
from errata.directories import refusals_as, write_whole
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

if TYPE_CHECKING:
    from errata.correct.methods.sheet import Sheet
    from errata.deploy import DeployedPipeline

FORMAT = "errata-plan/1"
# A plan that names every one of a thousand steps takes a few kilobytes; anything larger is not a plan.
_LARGEST = 2**20
# Far more than make sense; a hostile file must not nest them until Python gives up.
MOST_PARTS = 32
_auto: list[Callable[..., Plan]] = []


@dataclass(frozen=True)
class Plan:
    """Correct with `method` at `steps` (an expression, see `errata.correct.steps.GRAMMAR`).

    `plan + other` does both, `plan` first: `other` gets each step as `plan` corrected it.

    Attributes:
        method: None corrects nothing.
        steps: where; limited to the steps that the method serves.
        also: a further plan, applied after this one.
        artifact: digest of the only artifact that it may be used on; None allows any.
        expected: what it was measured to do there, if `errata.correct.plan` made it.

    Raises:
        PlanError: `method` is not a method, or `steps` is malformed.
    """

    method: Method | None
    steps: str = "all"
    also: Plan | None = None
    artifact: str | None = None
    expected: Expectation | None = None

    def __post_init__(self) -> None:
        grammar.check(self.steps)
        if self.method is None and self.steps != "none":
            raise PlanError(
                f"steps {self.steps!r} without a method; write Plan(IEC(), steps=…) or Plan.none()"
            )
        if self.method is not None and not _is_method(self.method):
            raise PlanError(f"{self.method!r} is not a correction method; write for instance Plan(IEC())")
        for name, kind in (("also", Plan), ("artifact", str), ("expected", Expectation)):
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise PlanError(f"Plan({name}={given!r}): it must be a {kind.__name__}, or None")
        if len(self.parts) > MOST_PARTS:
            raise PlanError(f"a plan of {len(self.parts)} parts; at most {MOST_PARTS} are allowed")

    def __add__(self, other: Plan) -> Plan:
        """Return a plan that does both, this one first; bound to the artifact that either is bound to.

        Raises:
            PlanError: they are bound to different artifacts.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        bound = sorted({plan.artifact for plan in (self, other) if plan.artifact is not None})
        if len(bound) > 1:
            raise PlanError(
                f"these plans were made for two artifacts, {' and '.join(bound)}; use plans for the same one"
            )
        also = other if self.also is None else self.also + other
        also = replace(also, artifact=None, expected=None)
        return Plan(self.method, self.steps, also, bound[0] if bound else None)

    @classmethod
    def none(cls) -> Plan:
        """Return the plan that corrects nothing."""
        return cls(None, "none")

    @classmethod
    def paper(cls, deployed: DeployedPipeline) -> Plan:
        """Return IEC where its paper puts it: at every step; at the full steps of an artifact with a cache;
        at the first step of a pipeline that takes text (in the paper, Stable Diffusion).

        Source: "Iterative Error Correction", implementation details.
        """
        if getattr(deployed.pipe, "text_encoder", None) is not None:
            return cls(IEC.paper(), "first:1")
        return cls(IEC.paper(), "full" if deployed.schedule.has_cache else "all")

    @classmethod
    def auto(cls, deployed: DeployedPipeline, **options: Any) -> Plan:
        """Return the best plan that costs nothing, see `errata.correct.planner.auto.auto`."""
        return _auto[-1](deployed, **options)

    @classmethod
    def under_sheet(cls, sheet: Sheet) -> Plan:
        """Return the plan that a sheet was fitted under, without the sheet.

        Raises:
            PlanError: a method of that plan is not known here.
        """
        parts = zip(sheet.facts.plan, sheet.facts.plan_steps, strict=True)
        plans = [cls(method_from_json(stored), steps) for stored, steps in parts]
        return functools.reduce(operator.add, plans) if plans else cls.none()

    @classmethod
    def of_sheet(cls, sheet: Sheet) -> Plan:
        """Return the plan that a sheet was fitted under, with the sheet; raises as `under_sheet`."""
        under = cls.under_sheet(sheet)
        return cls(sheet) if under.corrects_nothing else cls(sheet) + under

    @property
    def corrects_nothing(self) -> bool:
        """Whether no part of it corrects any step."""
        return all(method is None or steps == "none" for method, steps in self.parts)

    @property
    def parts(self) -> tuple[tuple[Method | None, str], ...]:
        """Method and steps of each part, in order."""
        return ((self.method, self.steps), *(() if self.also is None else self.also.parts))

    def bound(self, deployed: DeployedPipeline) -> Plan:
        """Return the same plan, for this artifact only."""
        return replace(self, artifact=deployed.manifest.sha256)

    @property
    def bound_to(self) -> frozenset[str]:
        """Digests of the artifacts that it, or a method such as a sheet, was made for; empty for any."""
        bound = [self.artifact, *(getattr(method, "artifact", None) for method, _ in self.parts)]
        return frozenset(digest for digest in bound if isinstance(digest, str))

    def suits(self, deployed: DeployedPipeline) -> bool:
        """Return whether it was made for this artifact, or for any."""
        return self.bound_to <= {deployed.manifest.sha256, deployed.manifest.artifact_sha256}

    def placed(self, schedule: CacheSchedule) -> tuple[tuple[Method, tuple[int, ...]], ...]:
        """Return each method with the steps that it will correct; methods without any are left out.

        Raises:
            PlanError: an expression names a step that the schedule does not have, or no step that the method
                serves.
        """
        return tuple(
            (method, _placed(method, steps, schedule))
            for method, steps in self.parts
            if method is not None and steps != "none"
        )

    def resolve(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the steps that any of its methods will correct, sorted.

        Raises:
            PlanError: as `placed`.
        """
        return tuple(sorted({step for _, steps in self.placed(schedule) for step in steps}))

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return {
            "type": "Plan",
            "version": 2,
            "method": None if self.method is None else self.method.to_json(),
            "steps": self.steps,
            "also": None if self.also is None else self.also.to_json(),
            "artifact": self.artifact,
            "expected": None if self.expected is None else self.expected.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_json` described.

        Raises:
            PlanError: another type or version, an unknown method, a missing or unknown key.
        """
        _check_depth(value)
        fields = fields_of(cls, value, version=2)
        also, artifact, expected = fields["also"], fields["artifact"], fields["expected"]
        if artifact is not None and not isinstance(artifact, str):
            raise PlanError(f"Plan.artifact is {artifact!r}; it must be the digest of an artifact, or null")
        return cls(
            method_from_json(fields["method"]),
            fields["steps"],
            None if also is None else cls.from_json(also),
            artifact,
            None if expected is None else Expectation.from_json(expected),
        )

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, whole or not at all, in place of what is there.

        Raises:
            PlanError: the file cannot be written there.
        """
        text = json.dumps({"format": FORMAT, "plan": self.to_json()}, indent=2, allow_nan=False)
        write_whole(Path(path), text.encode() + b"\n", error=PlanError, advice="choose another file")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan that `save` wrote.

        Raises:
            PlanError: no such file, not a plan, another format, or a key or value that no plan has.
        """
        source = Path(path)
        stored = _read(source)
        try:
            return cls.from_json(stored)
        except PlanError as problem:
            raise PlanError(f"`{source}`: {problem}") from problem
        except RecursionError:
            raise PlanError(f"`{source}` is nested too deep to be a plan; plan again") from None


def register_auto(choose: Callable[..., Plan]) -> Callable[..., Plan]:
    """Make a function the one behind `Plan.auto`; it samples, and so cannot be known to this module."""
    _auto.append(choose)
    return choose


def _read(source: Path) -> Any:
    """Return the value under `plan` in a file, unchecked.

    Raises:
        PlanError: there is no such file, or it is not a plan file of this format.
    """
    advice = "give a file that `errata plan` wrote"
    with refusals_as(PlanError, doing=f"read `{source}`", advice=advice), source.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise PlanError(f"`{source}` is larger than {_LARGEST:,} bytes, so it is not a plan; plan again")
    try:
        value = loads_strict(data)
    except ValueError as problem:
        if b'"errata-sheet"' in data[:4096]:
            raise PlanError(
                f"`{source}` is a sheet and not a plan; a sheet goes to `--sheet` or Sheet.load"
            ) from problem
        raise PlanError(f"`{source}` is not a plan: {problem}; plan again") from problem
    stored = value.get("format") if isinstance(value, dict) else None
    if stored != FORMAT:
        raise PlanError(f"`{source}` has format {stored!r}; this release reads {FORMAT!r}; plan again")
    if set(value) != {"format", "plan"}:
        odd = sorted(set(value) ^ {"format", "plan"})
        # Quoted, since a key may be anything, control codes of a terminal included.
        raise PlanError(f"`{source}` has missing or unknown keys: {', '.join(map(repr, odd))}; plan again")
    return value["plan"]


def _placed(method: Method, steps: str, schedule: CacheSchedule) -> tuple[int, ...]:
    served = method.serves(schedule)
    calls = schedule.calls_per_step  # those of a sampling step are corrected together, or not at all
    named = {step // calls for step in grammar.select(steps, schedule)}
    chosen = tuple(step for step in served if step // calls in named)
    if chosen:
        return chosen
    name = type(method).__name__
    if not served:
        raise PlanError(
            f"{name} cannot correct any step of this artifact: "
            + ("it has a cache" if schedule.has_cache else "it has no cache, so every step is a full one")
            + '; choose another method, or steps="none"'
        )
    raise PlanError(
        f"steps {steps!r} leaves nothing to correct: {name} can correct steps {grammar.spelled(served)} of "
        'this artifact; choose some of them, or write "none"'
    )


def _check_depth(value: Any) -> None:
    for _ in range(MOST_PARTS):
        value = value.get("also") if isinstance(value, Mapping) else None
    if value is not None:
        raise PlanError(f"a plan of more than {MOST_PARTS} parts; at most {MOST_PARTS} are allowed")


def _is_method(value: object) -> bool:
    return not isinstance(value, type) and hasattr(value, "serves") and hasattr(value, "corrector")
