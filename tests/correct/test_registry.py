from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from errata import correct
from errata.correct import methods, registry
from errata.correct.config_json import StoredDataclass
from errata.correct.traits import Traits, traits_of
from errata.errors import PlanError


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def defined(**members: Any) -> Any:
    return dataclass(frozen=True)(type("Mine", (StoredDataclass,), {"__module__": "mine", **members}))


def test_errata_s_methods_are_registered_and_say_what_they_do() -> None:
    own = {name for name, kind in correct.METHODS.items() if kind.__module__.startswith("errata.")}
    assert own >= {
        *("DiffIER", "EpsilonScaling", "FittedForecast", "Forecast", "Hindsight"),
        *("IEC", "Langevin", "Lookahead", "Refresh", "SecondOrder", "Sheet"),
    }
    homes = {correct.METHODS[name].__module__.rpartition(".")[2] for name in own}
    assert homes == {file.stem for file in Path(methods.__file__).parent.glob("[!_]*.py")}
    for name in own:
        kind = correct.METHODS[name]
        assert getattr(correct, name) is kind
        made = kind if name in ("FittedForecast", "Sheet") else kind()  # their numbers come from a fit
        assert traits_of(made) != Traits()
    assert not traits_of(correct.IEC.official()).per_image
    assert traits_of(correct.IEC()).per_image


def test_a_registered_method_is_found_by_name_in_files_and_in_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mine'"):
        _ = correct.Mine
    with pytest.raises(PlanError, match="unknown correction method 'Mine'.*import its module first"):
        registry.method_from_json({"type": "Mine", "version": 1})
    mine = correct.register_method(defined(traits=Traits(changes_prediction=True)))
    assert correct.Mine is mine
    assert registry.method_from_json(mine().to_json()) == mine()


def test_the_same_definition_may_run_twice_but_a_name_has_one_owner() -> None:
    again = [correct.register_method(defined(traits=Traits())) for _ in range(2)]
    assert correct.METHODS["Mine"] is again[1]
    with pytest.raises(PlanError, match="there is a method 'Mine' already, in mine; give yours another name"):
        correct.register_method(defined(traits=Traits(), __module__="other"))
    with pytest.raises(PlanError, match="there is a method 'IEC' already"):
        correct.register_method(dataclass(type("IEC", (), {"traits": Traits()})))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"Mine does not say what it does; add to the class: traits = correct.Traits"),
        ({"traits": "none"}, "traits is 'none'; it must be an instance of errata.correct.Traits"),
    ],
)
def test_a_method_that_does_not_say_what_it_does_is_not_registered(
    members: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        correct.register_method(defined(**members))
    assert "Mine" not in correct.METHODS


def test_only_dataclasses_are_registered() -> None:
    with pytest.raises(PlanError, match="Plain is not a dataclass; put @dataclass"):
        correct.register_method(type("Plain", (), {"traits": Traits()}))


def test_the_table_itself_cannot_be_written() -> None:
    table: Any = correct.METHODS
    with pytest.raises(TypeError, match="does not support item assignment"):
        table["Mine"] = object


def with_defaults() -> list[type[Any]]:
    """Registered methods that need no argument."""
    return [kind for kind in registry.METHODS.values() if kind not in (correct.FittedForecast, correct.Sheet)]


@pytest.mark.parametrize("kind", with_defaults(), ids=lambda kind: kind.__name__)
def test_no_method_takes_a_truth_value_for_a_number(kind: type[Any]) -> None:
    """In Python True equals 1."""
    stored = kind().to_json()
    for key, value in stored.items():
        if type(value) in (int, float):
            with pytest.raises(PlanError):
                kind.from_json({**stored, key: True})
