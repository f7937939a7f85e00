"""Old names lead to the new ones, and say so."""

import importlib
import sys

import pytest

import errata
from errata import renamed


@pytest.mark.parametrize("old", sorted(renamed.MODULES))
def test_an_old_module_can_be_imported(old: str) -> None:
    assert importlib.import_module(old).__name__ in (old, *renamed.MODULES[old])
    for new in renamed.MODULES[old]:
        assert importlib.import_module(new).__name__ == new


def test_what_is_in_an_old_module_is_the_new_thing_itself() -> None:
    from errata.runtime.step_context import StepContext

    old = importlib.import_module("errata.compress.network.clock")
    with pytest.warns(DeprecationWarning, match=r"\.StepClock is now errata\.runtime\.step_context"):
        assert old.StepClock is StepContext


def test_a_split_module_finds_each_name_where_it_went() -> None:
    from errata.compress.quantize.quantizers import choose_range
    from errata.runtime.ranges import quantize

    old = importlib.import_module("errata.compress.quantize.ranges")
    with pytest.warns(DeprecationWarning, match="is now errata"):
        assert (old.choose_range, old.quantize) == (choose_range, quantize)


def test_a_renamed_public_name_warns() -> None:
    from errata import correct

    with pytest.warns(DeprecationWarning, match="CorrectorContext"):
        assert correct.Setting is correct.CorrectorContext


def test_what_was_never_there_is_an_error() -> None:
    from errata import correct

    old = importlib.import_module("errata.compress.network.run")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = old.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = correct.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("errata.compress.network.nothing")


def test_error_names_of_earlier_releases_are_the_same_classes() -> None:
    assert errata.ArtifactCorrupt is errata.ArtifactCorruptError
    assert errata.ArtifactMismatch is errata.ArtifactMismatchError


def test_it_is_installed_once() -> None:
    before = list(sys.meta_path)
    renamed.install()
    assert sys.meta_path == before


def test_an_old_name_leaves_what_its_package_has_of_that_name() -> None:
    from errata import cli, quiet

    importlib.import_module("errata.cli.quiet")
    assert cli.__dict__["quiet"] is quiet
