"""Pipeline classes of a user's, by name."""

from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

from errata import pipelines
from errata.deploy.allowlist import is_pipeline, pipeline_class
from errata.errors import ArtifactVersionError


@pytest.fixture
def of_mine(monkeypatch: pytest.MonkeyPatch) -> type[DiffusionPipeline]:
    """A class that is registered for one test."""
    monkeypatch.setattr(pipelines, "_pipelines", dict(pipelines.PIPELINES))
    monkeypatch.setattr(pipelines, "PIPELINES", pipelines._pipelines)
    return type("OfMine", (DiffusionPipeline,), {})


def test_an_artifact_may_name_a_registered_class_and_no_other(of_mine: type[DiffusionPipeline]) -> None:
    assert not is_pipeline(of_mine)
    with pytest.raises(ArtifactVersionError, match="'OfMine'"):
        pipeline_class("OfMine")
    assert pipelines.register(of_mine) is of_mine
    assert pipeline_class("OfMine") is of_mine
    assert is_pipeline(of_mine)


def test_a_class_that_is_defined_again_takes_the_place_of_the_older(of_mine: Any) -> None:
    pipelines.register(of_mine)
    again = type("OfMine", (DiffusionPipeline,), {})
    pipelines.register(again)
    assert pipeline_class("OfMine") is again


@pytest.mark.parametrize("name", ["DDIMPipeline", "ClassConditionalLDMPipeline"])
def test_a_name_that_is_taken_is_refused(of_mine: Any, name: str) -> None:
    impostor = type(name, (DiffusionPipeline,), {})
    with pytest.raises(ValueError, match=f"{name} is already the name of .*; choose another name"):
        pipelines.register(impostor)
    assert pipeline_class(name) is not impostor


@pytest.mark.parametrize("kind", [object, diffusers.UNet2DModel, "OfMine"])
def test_only_pipelines_are_registered(of_mine: Any, kind: Any) -> None:
    with pytest.raises(TypeError, match="is not a pipeline class; register a subclass of DiffusionPipeline"):
        pipelines.register(kind)
