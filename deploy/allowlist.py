"""Classes that an artifact may name, and how a name becomes a class: never by an import path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin

from errata import pipelines
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError

OURS = "errata.pipelines"


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """Return the pipeline of errata's or of diffusers' that has this name.

    Raises:
        ArtifactVersionError: neither has one.
    """
    found = pipelines.PIPELINES.get(name) or (getattr(diffusers, name, None) if name.isidentifier() else None)
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        raise ArtifactVersionError(
            f"{name[:80]!r} is not a DiffusionPipeline of diffusers {diffusers.__version__} or errata; "
            "update them, and install `errata[text]` if it reads text"
        )
    return found


def is_pipeline(kind: type[Any]) -> bool:
    """Return whether `pipeline_class` finds this very class."""
    try:
        return pipeline_class(kind.__name__) is kind
    except ArtifactVersionError:
        return False


def component_class(library: str, name: str) -> type[Any]:
    """Return the class of a component from the two words that stand for it in `model_index.json`.

    `library` is "diffusers", "transformers", "errata.pipelines", or a folder of `diffusers.pipelines`.
    Nothing else is ever imported.

    Raises:
        ArtifactCorruptError: another library.
        ArtifactVersionError: the library has no such model, scheduler, tokenizer or processor.
        ArtifactError: the library is not installed.
    """
    resolve = _LIBRARIES.get(library)
    if resolve is None and library in _pipeline_folders():
        resolve = _pipeline_local(library)
    if resolve is None:
        raise ArtifactCorruptError(
            f"component library {library!r} is not allowed; allowed are {', '.join(sorted(_LIBRARIES))} and "
            "the folders of diffusers.pipelines"
        )
    found = resolve(name) if name.isidentifier() and not name.startswith("_") else None
    if found is None:
        raise ArtifactVersionError(
            f"{library!r} has no model, scheduler, tokenizer or processor called {name!r}; update it"
        )
    return found


def entry_of(component: object) -> tuple[str, str]:
    """Return the two words that stand for a component, so that `component_class` finds its class again.

    Raises:
        ArtifactError: an artifact may not name its class.
    """
    kind = type(component)
    module = kind.__module__.split(".")
    library = module[0]
    if module[:2] == ["diffusers", "pipelines"] and len(module) > 3:
        library = module[2]
    elif module[:2] == OURS.split("."):
        library = OURS
    try:
        is_known = component_class(library, kind.__name__) is kind
    except ArtifactError:
        is_known = False
    if not is_known:
        raise ArtifactError(
            f"a {kind.__module__}.{kind.__name__} cannot be deployed: an artifact names only classes of "
            "diffusers, transformers and errata; replace the component"
        )
    return library, kind.__name__


def is_transformers_model(kind: type[Any]) -> bool:
    """Return whether it is one of transformers' networks; does not import transformers for that."""
    return any(base.__module__ == "transformers.modeling_utils" for base in kind.__mro__)


def is_tokenizer(kind: type[Any]) -> bool:
    """Return whether it is one of transformers' tokenizers."""
    return any(base.__module__ == "transformers.tokenization_utils_base" for base in kind.__mro__)


def _ours(name: str) -> type[Any] | None:
    return pipelines.MODELS.get(name)


def _diffusers(name: str) -> type[Any] | None:
    return _of_kind(getattr(diffusers, name, None), ModelMixin, SchedulerMixin, ConfigMixin)


def _transformers(name: str) -> type[Any] | None:
    try:
        import transformers
    except ImportError as error:
        raise ArtifactError(
            f"the artifact has a {name}, which needs transformers; `pip install 'errata[text]'`"
        ) from error
    try:
        found = getattr(transformers, name, None)
    except ImportError as error:  # a class whose own requirements are not installed
        raise ArtifactError(f"transformers cannot make a {name}: {str(error).strip()}") from error
    return _of_kind(
        found,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ProcessorMixin,
        transformers.image_processing_base.ImageProcessingMixin,
    )


def _pipeline_local(folder: str) -> Callable[[str], type[Any] | None]:
    def resolve(name: str) -> type[Any] | None:
        module = importlib.import_module(f"diffusers.pipelines.{folder}")
        found = _of_kind(getattr(module, name, None), object)
        if found is None or not found.__module__.startswith("diffusers.pipelines."):
            return None
        return found if is_transformers_model(found) else _of_kind(found, ModelMixin, SchedulerMixin)

    return resolve


def _of_kind(found: Any, *kinds: type) -> type[Any] | None:
    """Return `found` if it is a class of one of these kinds; a whole pipeline is no component."""
    if not isinstance(found, type) or not issubclass(found, kinds) or issubclass(found, DiffusionPipeline):
        return None
    return found


def _pipeline_folders() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__) if module.ispkg}


_LIBRARIES: dict[str, Callable[[str], type[Any] | None]] = {
    OURS: _ours,
    "diffusers": _diffusers,
    "transformers": _transformers,
}
