"""What the command line knows of the methods without importing them is what they are."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from errata import cli, method_options
from errata.cli.plans import plan_from
from errata.cli.usage import UsageError
from errata.correct import METHODS, Corrector, CorrectorContext, Plan, Traits, register_method, registry
from errata.correct.config_json import StoredDataclass
from errata.method_options import command_name, method_entries
from errata.runtime.schedule import CacheSchedule

IN_FILES_ONLY = {"FittedForecast", "Sheet"}  # their numbers come from `errata plan` and `errata sheet`


@pytest.fixture
def _own_methods_only() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def test_the_source_says_what_the_classes_say() -> None:
    own = {entry.class_name: entry for entry in method_options._own_entries()}
    errata_s = {name: kind for name, kind in METHODS.items() if kind.__module__.startswith("errata.")}
    assert {*own} | IN_FILES_ONLY == {*errata_s}
    for name, entry in own.items():
        assert entry == method_options._entry_of_class(METHODS[name])
        assert [option.field for option in entry.options] == [
            field.name
            for field in dataclasses.fields(METHODS[name])  # type: ignore[arg-type]
        ]


def test_every_option_is_explained() -> None:
    for entry in method_options._own_entries():
        for option in entry.options:
            assert len(option.help.split()) >= 2, (entry.name, option)
            assert option.help != option.field.replace("_", " ")
            assert not option.help.endswith((".", ";", ":"))


@pytest.mark.parametrize(
    ("class_name", "name"),
    [("IEC", "iec"), ("DiffIER", "diffier"), ("SecondOrder", "second-order"), ("TwoStep", "two-step")],
)
def test_names(class_name: str, name: str) -> None:
    assert command_name(class_name) == name


def test_help_imports_no_method() -> None:
    program = (
        "import sys; from errata import cli; cli.main(['generate', '--help']); "
        "sys.exit(*[{'torch', 'errata.correct'} & set(sys.modules)] or None)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr == "set()\n"
    assert "step size per iteration (default: 0.05 for diffier, 0.5 for iec)" in " ".join(
        found.stdout.split()
    )


@pytest.mark.usefixtures("_own_methods_only")
def test_a_registered_method_has_options_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @register_method
    @dataclass(frozen=True, kw_only=True)
    class Sharper(StoredDataclass):
        """More of everything.

        Attributes:
            amount: how much more; in (0, 1].
            weight: how many times, a whole number.
            where: which part, by
                its name.
            others: a list, which the command line cannot give.
        """

        traits = Traits(changes_prediction=True)

        amount: float = 0.5
        weight: int = 2
        where: Literal["centre", "edge"] = "edge"
        others: tuple[int, ...] | None = None

        def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
            return schedule.full_steps

        def check(self, context: CorrectorContext) -> None: ...

        def corrector(self, context: CorrectorContext) -> Corrector:
            return Corrector(context)

    (entry,) = [entry for entry in method_entries() if entry.name == "sharper"]
    assert [(option.kind, option.allowed, option.default, option.help) for option in entry.options] == [
        ("number", (), "0.5", "how much more"),
        ("whole number", (), "2", "how many times, a whole number"),
        ("word", ("centre", "edge"), "edge", "which part, by its name"),
    ]
    assert cli.main(["generate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--amount X how much more (default: 0.5 for sharper)" in said
    assert "weight of the evaluation at the end of the step (default: 0.5 for second-order)" in said
    # A field that two methods read differently is read by each in its own way.
    for text, number in (("3", 3), ("0.5", None)):
        arguments = ["generate", "x", "--out", "y", "--correct", "sharper", "--weight", text]
        args = cli.build_parser().parse_args(arguments)
        if number is None:
            with pytest.raises(UsageError, match="`0.5` is not a whole number"):
                plan_from(args)
        else:
            assert plan_from(args) == Plan(Sharper(weight=number))
    Plan(Sharper(amount=0.25)).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == Plan(Sharper(amount=0.25))
