"""A plan: which method, at which steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.compress.recipes.schedule import CacheSchedule
from errata.correct import steps as grammar
from errata.correct.config_json import fields_of
from errata.correct.corrector import Method
from errata.correct.iec import IEC
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.deploy import DeployedPipeline

# Method types that a stored plan may name; never resolved by import path.
_METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {"IEC": IEC.from_json}


@dataclass(frozen=True)
class Plan:
    """Correct with `method` at `steps` (an expression, see `errata.correct.steps.GRAMMAR`).

    Raises:
        PlanError: `method` is none, or `steps` is malformed.
    """

    method: Method | None
    steps: str = "all"

    def __post_init__(self) -> None:
        grammar.check(self.steps)
        if self.method is None and self.steps != "none":
            raise PlanError(
                f"steps {self.steps!r} without a method; write Plan(IEC(), steps=…) or Plan.none()"
            )
        if self.method is not None and not _is_method(self.method):
            raise PlanError(f"{self.method!r} is no correction method; write Plan({_offered()}) for instance")

    @classmethod
    def none(cls) -> Plan:
        """Correct nothing."""
        return cls(None, "none")

    @classmethod
    def paper(cls, deployed: DeployedPipeline) -> Plan:
        """IEC where its paper puts it: at every step, or at the full steps of an artifact with a cache.

        Source: "Iterative Error Correction", implementation details.
        """
        return cls(IEC(), "full" if deployed.schedule.has_cache else "all")

    def resolve(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The steps that will be corrected, sorted: those named that the method serves.

        Raises:
            PlanError: the expression names a step that the schedule does not have, or nothing is left.
        """
        if self.method is None or self.steps == "none":
            return ()
        served = self.method.serves(schedule)
        chosen = tuple(sorted(set(grammar.select(self.steps, schedule)) & set(served)))
        if not chosen:
            raise PlanError(
                f"steps {self.steps!r} leaves nothing to correct: {type(self.method).__name__} serves steps "
                f'{grammar.spelled(served)} of this artifact; name some of them, or write "none"'
            )
        return chosen

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
        method = None if self.method is None else self.method.to_json()
        return {"type": "Plan", "version": 1, "method": method, "steps": self.steps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            PlanError: another type or version, an unknown method, a missing or an unknown key.
        """
        fields = fields_of(cls, value, version=1)
        stored = fields["method"]
        if stored is None:
            return cls(None, fields["steps"])
        kind = stored.get("type") if isinstance(stored, Mapping) else None
        if not isinstance(kind, str) or kind not in _METHODS:
            named = repr(stored if kind is None else kind)
            raise PlanError(f"unknown correction method {named}; known are {', '.join(sorted(_METHODS))}")
        return cls(_METHODS[kind](stored), fields["steps"])


def _is_method(value: object) -> bool:
    return not isinstance(value, type) and hasattr(value, "serves") and hasattr(value, "corrector")


def _offered() -> str:
    return " or ".join(f"{name}()" for name in sorted(_METHODS))
