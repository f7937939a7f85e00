"""Draw who imports whom: the stages as text or Mermaid, the modules with their importers, and cycles.

    scripts/import_graph.py                the stages, how many modules have one importer, and cycles
    scripts/import_graph.py --mermaid      the stages as a Mermaid graph
    scripts/import_graph.py --modules errata.compress
                                           each module below that name with its importers

Imports inside functions count. Those for type checkers alone count as importers, but make no cycle, since
they never run. Nothing is imported to find out.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("core", "runtime", "calibration", "compress", "deploy", "correct", "report")

Graph = Mapping[str, frozenset[str]]
"""Modules, each with the modules that it imports."""


def read_graph(root: Path = ROOT, *, with_types: bool = False) -> Graph:
    """Return every module of the package with the modules of the package that it imports.

    `with_types` includes what is imported under `if TYPE_CHECKING`.
    """
    sources = {name_of(path, root): path for stage in STAGES for path in (root / stage).rglob("*.py")}
    return {
        name: frozenset(_imports(path, sources, with_types=with_types)) - {name}
        for name, path in sorted(sources.items())
    }


def name_of(path: Path, root: Path = ROOT) -> str:
    """Return the import name of a source file."""
    stage, *parts = path.relative_to(root).with_suffix("").parts
    words = ["errata", *([] if stage == "core" else [stage]), *parts]
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def stage_of(module: str) -> str:
    """Return the folder that a module lies in."""
    second = f"{module}.".split(".")[1]
    return second if second in STAGES else "core"


def importers(graph: Graph) -> dict[str, list[str]]:
    """Return every module with the modules that import it, sorted."""
    return {name: sorted(other for other in graph if name in graph[other]) for name in graph}


def imported_once(graph: Graph) -> list[str]:
    """Return the modules that exactly one other module imports."""
    return [name for name, found in importers(graph).items() if len(found) == 1]


def stage_edges(graph: Graph) -> dict[tuple[str, str], int]:
    """Return how many imports go from one stage to another, most first."""
    edges: dict[tuple[str, str], int] = {}
    for name, imported in graph.items():
        for other in imported:
            pair = stage_of(name), stage_of(other)
            if pair[0] != pair[1]:
                edges[pair] = edges.get(pair, 0) + 1
    return dict(sorted(edges.items(), key=lambda item: (-item[1], item[0])))


def cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Return the groups of modules that import each other, sorted; Tarjan's algorithm."""
    found: list[tuple[str, ...]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(found)


def _imports(path: Path, sources: Mapping[str, Path], *, with_types: bool) -> Iterator[str]:
    """Yield the modules that a source file imports; what is imported from a package may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if with_types else _running(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names if item.name in sources)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                full = f"{node.module}.{item.name}"
                yield from (name for name in [full if full in sources else node.module] if name in sources)


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree, without what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not is_for_types:
            yield node
            yield from _running(node)


def mermaid(graph: Graph) -> str:
    """Return the stages as a Mermaid graph; each arrow leads to what is imported."""
    lines = [f"    {one} -->|{count}| {other}" for (one, other), count in stage_edges(graph).items()]
    return "\n".join(["graph LR", *lines])


def summary(graph: Graph, with_types: Graph) -> str:
    """Return the stages, the counts and the cycles as text."""
    lines = [f"{one:12} imports {other:12} {count:4}" for (one, other), count in stage_edges(graph).items()]
    lines += ["", f"{len(graph)} modules, {len(imported_once(with_types))} with one importer"]
    lines += [f"cycle: {', '.join(group)}" for group in cycles(graph)] or ["no cycles"]
    return "\n".join(lines)


def modules(graph: Graph, prefix: str) -> str:
    """Return the modules below a name, one a line, with the modules that import them."""
    rows = [(name, found) for name, found in importers(graph).items() if f"{name}.".startswith(f"{prefix}.")]
    return "\n".join(f"{name}: {len(found)}: {', '.join(found)}" for name, found in rows)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mermaid", action="store_true", help="the stages as a Mermaid graph")
    parser.add_argument("--modules", metavar="NAME", help="modules below this name, with their importers")
    args = parser.parse_args()
    graph, with_types = read_graph(), read_graph(with_types=True)
    if args.modules:
        print(modules(with_types, args.modules))
    else:
        print(mermaid(graph) if args.mermaid else summary(graph, with_types))
    return 0


if __name__ == "__main__":
    sys.exit(main())
