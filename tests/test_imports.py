"""The import rule: who may know whom, and what `--help` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlxroute

PACKAGE = Path(mlxroute.__file__).parent

_BASE = {"types", "errors", "closeable", "safe_text", "sequences", "statistics", "_version"}
# For each room, the rooms it may import besides itself and the base.
_ROOMS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "closeable": set(),
    "safe_text": set(),
    "sequences": set(),
    "statistics": set(),
    "_version": set(),
    "config": set(),
    "catalog": set(),
    "ledger": set(),
    "conversation": set(),
    "tokenizers": set(),
    "backend": set(),
    "weights": {"catalog"},
    "questions": set(),
    "routers": set(),
    "engine": set(),
    "small": {"backend", "catalog", "config", "tokenizers", "weights"},
    "large": {"ledger", "tokenizers"},
    # "" is the package itself, to tell a child where it lies
    "hosting": {"backend", "large", ""},
    "view": set(),
    "recorded": {"engine", "routers"},
    "training": {"catalog", "engine", "questions", "recorded", "routers", "small"},
    "bench": {
        "catalog",
        "engine",
        "large",
        "questions",
        "recorded",
        "routers",
        "small",
        "training",
    },
}
# Third parties that stop at these rooms.
_WALLS: dict[str, set[str]] = {
    "mlx": {"small", "backend", "hosting", "weights", "cli", "bench", "training"},
    "mlx_lm": {"small", "backend", "hosting", "tokenizers", "bench"},
    "requests": {"large", "weights", "bench"},
    "rich": {"view", "cli"},
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "wcwidth": {"view"},
    "gguf": {"weights"},
    "numpy": {"weights", "bench"},
    "huggingface_hub": {"weights"},
}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] in {"__init__", "__main__"} else parts[0]


def _imports(path: Path) -> set[str]:
    return _imported(ast.parse(path.read_text(encoding="utf-8")))


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "mlxroute":
                names |= {f"mlxroute.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_design_allows(path: Path) -> None:
    room = _room(path)
    for name in _imports(path):
        top, *rest = name.split(".")
        if top == "mlxroute":
            target = rest[0] if rest else ""
            if room in _ROOMS and target != room:
                assert target in _BASE | _ROOMS[room], f"{path} must not import {name}"
        elif top in _WALLS:
            assert room in _WALLS[top], f"{path} must not import {name}"


def test_every_room_has_a_rule() -> None:
    free = {"", "cli"}
    assert {_room(path) for path in _modules()} - free == set(_ROOMS)


def _loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(name.split('.')[0] for name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded_by("from mlxroute.cli import main\nmain(['--help'])")
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "requests", "huggingface_hub", "gguf"}
    assert not loaded & (heavy | {"prompt_toolkit", "rich", "psutil"})


def test_importing_the_package_does_no_work() -> None:
    loaded = _loaded_by("import mlxroute")
    assert not loaded & {"mlx", "requests", "typer", "rich", "numpy"}


def test_what_is_imported_before_a_model_is_loaded_leaves_mlx_out() -> None:
    # MLX uses the faster BLAS only if that is open before MLX is imported.
    commands = sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in (PACKAGE / "cli").rglob("*.py")
    )
    options = ["mlxroute.bench.latency", "mlxroute.bench.quality"]
    names = [*commands, *options, "mlxroute.small", "mlxroute.hosting.launcher"]
    assert not _loaded_by(f"import {', '.join(names)}") & {"mlx", "mlx_lm"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "small").rglob("*.py")), ids=lambda p: p.name)
def test_small_imports_mlx_at_the_top_of_its_modules(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, functions):
            inside = ast.Module(body=list(node.body), type_ignores=[])
            assert not {name.split(".")[0] for name in _imported(inside)} & {"mlx", "mlx_lm"}


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert list(mlxroute.__all__) == sorted(mlxroute.__all__)
    for name in mlxroute.__all__:
        assert getattr(mlxroute, name) is not None
