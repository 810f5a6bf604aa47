"""The import graph of the package: which module imports which, and the circles in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mlxroute

PACKAGE = Path(mlxroute.__file__).parent


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package; that of an `__init__` is its folder's."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(tree: ast.AST) -> set[str]:
    """Return the modules a tree imports anywhere, as full names; type-checking imports count."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in MODULES else node.module)
    return names


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return the modules that a file imports."""
    return frozenset(imported_names(ast.parse(path.read_text(encoding="utf-8"))))


def module_graph() -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    return {name: {*imports_of(path)} & MODULES.keys() - {name} for name, path in MODULES.items()}


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield circles of a graph, each as the names along it; the last one equals the first."""
    rest = {name: set(targets) for name, targets in graph.items()}
    while True:
        try:
            TopologicalSorter(rest).prepare()
        except CycleError as exc:
            # graphlib lists each node before those that depend on it.
            circle = list(reversed(exc.args[1]))
            yield circle
            rest[circle[0]].discard(circle[1])
        else:
            return
