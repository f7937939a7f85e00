"""The denoiser's other arguments as one flat mapping from name to tensor, and back.

`added_cond_kwargs={"text_embeds": a, "time_ids": b}` becomes `added_cond_kwargs.text_embeds` and
`added_cond_kwargs.time_ids`; the tensors of a list become `name.0`, `name.1`, …
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errata.errors import CalibrationError

__all__ = ["flatten", "nest"]


def flatten(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name every tensor by the path that leads to it; None and empty containers have nothing to say.

    Raises:
        CalibrationError: an argument is neither a tensor, nor None, nor a mapping or list of such; or a key
            could not be told from a path.
    """
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        _flatten_into(flat, name, value)
    return flat


def _flatten_into(flat: dict[str, Tensor], path: str, value: Any) -> None:
    match value:
        case None:
            return
        case Tensor():
            flat[path] = value
        case Mapping():
            for key, item in value.items():
                if not isinstance(key, str) or not key or "." in key or key.isdigit():
                    raise CalibrationError(
                        f"UNet argument `{path}` has the key {key!r}; a recordable key is a text without "
                        "dots that is not a number"
                    )
                _flatten_into(flat, f"{path}.{key}", item)
        case list() | tuple():
            for position, item in enumerate(value):
                _flatten_into(flat, f"{path}.{position}", item)
        case _:
            raise CalibrationError(
                f"UNet argument `{path}` is {value!r}, a {type(value).__name__}; only tensors (and mappings "
                "or lists of them) can be recorded; call the pipeline without it"
            )


def nest(cond: Mapping[str, Tensor]) -> dict[str, Any]:
    """Turn recorded conditioning back into keyword arguments of the denoiser; lists come back as tuples."""
    tree: dict[str, Any] = {}
    for path, value in cond.items():
        *parents, leaf = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return {name: _as_arguments(value) for name, value in tree.items()}


def _as_arguments(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    items = {key: _as_arguments(value) for key, value in node.items()}
    if all(key.isdigit() for key in items):
        return tuple(items[key] for key in sorted(items, key=int))
    return items
