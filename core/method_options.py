"""What the command line offers of each correction method, read from the methods' own declarations.

`errata --help` must not import torch, so errata's own methods are not imported: their declarations are read
from the source files in `correct/methods/`, as text. A method that a program registered itself
(`errata.correct.register_method`) is read from its class. Either way, the options are the fields of the
dataclass, and their help is what `Attributes:` says of a field, up to the first full stop or semicolon.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NO_DEFAULT = object()


@dataclass(frozen=True)
class MethodOption:
    """A field of a method that the command line can set.

    Attributes:
        field: its name in the class.
        kind: "number", "whole number", "true or false", or "word".
        allowed: the words, where it is one of some words.
        default: of the class, as it is written on the command line.
        help: what it does.
    """

    field: str
    kind: str
    allowed: tuple[str, ...]
    default: str
    help: str


@dataclass(frozen=True)
class MethodEntry:
    """A method that the command line can make.

    Attributes:
        name: on the command line.
        class_name: in Python and in plan files.
        options: its fields, in order.
    """

    name: str
    class_name: str
    options: tuple[MethodOption, ...]


def command_name(class_name: str) -> str:
    """Return the name of a method on the command line: `SecondOrder` is `second-order`, `IEC` is `iec`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", class_name).lower()


def method_entries() -> tuple[MethodEntry, ...]:
    """Return the methods that the command line offers, by name: errata's own, and those registered so far.

    A method with a field that has no default is left out (`FittedForecast`, whose weights come from a plan).
    """
    found = {entry.class_name: entry for entry in _own_entries()}
    registry = sys.modules.get("errata.correct.registry")
    for class_name, kind in () if registry is None else registry.METHODS.items():
        if class_name not in found and (entry := _entry_of_class(kind)) is not None:
            found[class_name] = entry
    return tuple(sorted(found.values(), key=lambda entry: entry.name))


@functools.cache
def _own_entries() -> tuple[MethodEntry, ...]:
    correct = importlib.util.find_spec("errata.correct")
    assert correct is not None
    assert correct.origin is not None
    files = sorted((Path(correct.origin).parent / "methods").glob("*.py"))
    declared = (cls for file in files for cls in _declarations(file.read_text(encoding="utf-8")))
    return tuple(entry for cls in declared if (entry := _entry_of_source(cls)) is not None)


def _declarations(source: str) -> Iterator[ast.ClassDef]:
    """Yield the registered classes of a file, up to their first function.

    The rest of a file is not parsed: it would take most of the time, and `errata --help` waits for this.
    """
    lines = source.splitlines()
    for index, line in enumerate(lines):
        if line == "@register_method":
            start = next(i for i in range(index, len(lines)) if lines[i].startswith("class "))
            body = itertools.takewhile(_is_declaration, lines[start + 1 :])
            (node,) = ast.parse("\n".join([lines[start], *body])).body
            assert isinstance(node, ast.ClassDef)
            yield node


def _is_declaration(line: str) -> bool:
    """Return whether a line of a class comes before its functions and before its end."""
    return line[:1] in ("", " ") and not line.startswith(("    def ", "    @"))


def _entry_of_source(node: ast.ClassDef) -> MethodEntry | None:
    fields = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            default = _NO_DEFAULT if item.value is None else ast.literal_eval(item.value)
            fields.append((item.target.id, ast.unparse(item.annotation), default))
    fields = [field for field in fields if not field[1].startswith("ClassVar")]
    return _entry(node.name, ast.get_docstring(node) or "", fields)


def _entry_of_class(kind: Any) -> MethodEntry | None:
    fields = [
        (
            field.name,
            field.type if isinstance(field.type, str) else _spelled(field.type),
            _NO_DEFAULT if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(kind)
    ]
    return _entry(kind.__name__, inspect.cleandoc(kind.__doc__ or ""), fields)


def _spelled(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _entry(class_name: str, documentation: str, fields: list[tuple[str, str, Any]]) -> MethodEntry | None:
    if any(default is _NO_DEFAULT for _, _, default in fields):
        return None
    told = _documented(documentation)
    options = []
    for name, annotation, default in fields:
        if (found := _kind(annotation)) is not None:
            kind, allowed = found
            options.append(
                MethodOption(name, kind, allowed, _written(default), told.get(name, name.replace("_", " ")))
            )
    return MethodEntry(command_name(class_name), class_name, tuple(options))


def _written(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _kind(annotation: str) -> tuple[str, tuple[str, ...]] | None:
    """Return how the text of an option is read, and its words; None where no option can give the value."""
    names = {"float": "number", "int": "whole number", "bool": "true or false", "str": "word"}
    for part in annotation.split(" | "):
        if part in names:
            return names[part], ()
        if match := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", part):
            return "word", tuple(ast.literal_eval(f"({match[1]},)"))
    return None


def _documented(documentation: str) -> dict[str, str]:
    """Return what `Attributes:` says of each field, up to the first full stop or semicolon."""
    _, _, section = documentation.partition("Attributes:\n")
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    told = {}
    for entry in re.split(r"^ {4}(?=\w+: )", section, flags=re.MULTILINE)[1:]:
        name, text = " ".join(entry.split()).split(": ", 1)
        told[name] = re.split(r"[.;](?:\s|$)", text, maxsplit=1)[0]
    return told
