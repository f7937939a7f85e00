"""A plan: which methods, at which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.correct import steps as grammar
from errata.correct.config_json import fields_of
from errata.correct.corrector import Method
from errata.correct.diffier import DiffIER
from errata.correct.epsilon_scaling import EpsilonScaling
from errata.correct.fitted_forecast import FittedForecast
from errata.correct.forecast import Forecast
from errata.correct.hindsight import Hindsight
from errata.correct.iec import IEC
from errata.correct.langevin import Langevin
from errata.correct.lookahead import Lookahead
from errata.correct.planner.expectation import Expectation
from errata.correct.refresh import Refresh
from errata.correct.second_order import SecondOrder
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

if TYPE_CHECKING:
    from errata.deploy import DeployedPipeline

# Method types that a stored plan may name; never resolved by import path.
_KINDS: tuple[type[Method], ...] = (
    DiffIER,
    EpsilonScaling,
    FittedForecast,
    Forecast,
    Hindsight,
    IEC,
    Langevin,
    Lookahead,
    Refresh,
    SecondOrder,
)
METHODS: Mapping[str, type[Method]] = {kind.__name__: kind for kind in _KINDS}
# Far more than make sense; a hostile file must not nest them until Python gives up.
MOST_PARTS = 32


@dataclass(frozen=True)
class Plan:
    """Correct with `method` at `steps` (an expression, see `errata.correct.steps.GRAMMAR`).

    `plan + other` does both, `plan` first: what it makes of a step is what `other` gets.

    Attributes:
        method: None corrects nothing.
        steps: intersected with those that the method serves.
        also: what is done besides.
        artifact: digest of the only artifact that it may be used on; None is any.
        expected: what it was measured to do there, where `errata.correct.plan` made it.

    Raises:
        PlanError: `method` is none, or `steps` is malformed.
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
            raise PlanError(f"{self.method!r} is no correction method; write Plan(IEC()) for instance")
        for name, kind in (("also", Plan), ("artifact", str), ("expected", Expectation)):
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise PlanError(f"Plan({name}={given!r}): it must be a {kind.__name__}, or None")
        if len(self.parts) > MOST_PARTS:
            raise PlanError(f"a plan of {len(self.parts)} parts; at most {MOST_PARTS} are allowed")

    def __add__(self, other: Plan) -> Plan:
        """Both, this one first; bound to the artifact that either is bound to.

        Raises:
            PlanError: they are bound to two artifacts.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        bound = sorted({plan.artifact for plan in (self, other) if plan.artifact is not None})
        if len(bound) > 1:
            raise PlanError(
                f"these plans were made for two artifacts, {' and '.join(bound)}; use one of them"
            )
        also = other if self.also is None else self.also + other
        also = replace(also, artifact=None, expected=None)
        return Plan(self.method, self.steps, also, bound[0] if bound else None)

    @classmethod
    def none(cls) -> Plan:
        """Correct nothing."""
        return cls(None, "none")

    @classmethod
    def paper(cls, deployed: DeployedPipeline) -> Plan:
        """IEC where its paper puts it: at every step; at the full steps of an artifact with a cache; at the
        first step of a pipeline that takes text (in the paper, Stable Diffusion).

        Source: "Iterative Error Correction", implementation details.
        """
        if getattr(deployed.pipe, "text_encoder", None) is not None:
            return cls(IEC.paper(), "first:1")
        return cls(IEC.paper(), "full" if deployed.schedule.has_cache else "all")

    @property
    def corrects_nothing(self) -> bool:
        """Whether no part of it names a step."""
        return all(method is None or steps == "none" for method, steps in self.parts)

    @property
    def parts(self) -> tuple[tuple[Method | None, str], ...]:
        """Method and steps of everything that is done, in order."""
        return ((self.method, self.steps), *(() if self.also is None else self.also.parts))

    def placed(self, schedule: CacheSchedule) -> tuple[tuple[Method, tuple[int, ...]], ...]:
        """Each method with the steps that it will correct; without those that correct nothing.

        Raises:
            PlanError: an expression names a step that the schedule does not have, or nothing is left of it.
        """
        return tuple(
            (method, _placed(method, steps, schedule))
            for method, steps in self.parts
            if method is not None and steps != "none"
        )

    def resolve(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The steps that will be corrected by any of its methods, sorted.

        Raises:
            PlanError: as `placed`.
        """
        return tuple(sorted({step for _, steps in self.placed(schedule) for step in steps}))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
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
        """Inverse of `to_json`.

        Raises:
            PlanError: another type or version, an unknown method, a missing or an unknown key.
        """
        _check_depth(value)
        fields = fields_of(cls, value, version=2)
        also, artifact, expected = fields["also"], fields["artifact"], fields["expected"]
        if artifact is not None and not isinstance(artifact, str):
            raise PlanError(f"Plan.artifact is {artifact!r}; expected the digest of an artifact, or null")
        return cls(
            _method(fields["method"]),
            fields["steps"],
            None if also is None else cls.from_json(also),
            artifact,
            None if expected is None else Expectation.from_json(expected),
        )

    def save(self, path: str | Path) -> None:
        """Writes it as a JSON file, in place of what is there. See `errata.correct.plan_file`."""
        from errata.correct.plan_file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote.

        Raises:
            PlanError: there is no such file, or it holds no plan.
        """
        from errata.correct.plan_file import load_plan

        return load_plan(path)


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
            f"{name} serves no step of this artifact: "
            + ("it has a cache" if schedule.has_cache else "it has no cache, so every step is a full one")
            + '; choose another method, or steps="none"'
        )
    raise PlanError(
        f"steps {steps!r} leaves nothing to correct: {name} serves steps {grammar.spelled(served)} of this "
        'artifact; name some of them, or write "none"'
    )


def _check_depth(value: Any) -> None:
    for _ in range(MOST_PARTS):
        value = value.get("also") if isinstance(value, Mapping) else None
    if value is not None:
        raise PlanError(f"a plan of more than {MOST_PARTS} parts; at most {MOST_PARTS} are allowed")


def _method(stored: Any) -> Method | None:
    if stored is None:
        return None
    kind = stored.get("type") if isinstance(stored, Mapping) else None
    if not isinstance(kind, str) or kind not in METHODS:
        named = repr(stored if kind is None else kind)
        raise PlanError(f"unknown correction method {named}; known are {', '.join(sorted(METHODS))}")
    return METHODS[kind].from_json(stored)


def _is_method(value: object) -> bool:
    return not isinstance(value, type) and hasattr(value, "serves") and hasattr(value, "corrector")
