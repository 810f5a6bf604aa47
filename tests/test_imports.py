"""The import rules: which room may import which, no circles, and what `--help` may load."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import mlxroute
from tests.support.import_graph import (
    MODULES,
    PACKAGE,
    circles,
    imported_names,
    imports_of,
    module_graph,
)

_BASE = {
    "types",
    "errors",
    "closeable",
    "ports",
    "replace_file",
    "safe_text",
    "sequences",
    "statistics",
    "messages",
    "_version",
    "untrusted_text",
    "user_folders",
}
# For each room, the rooms it may import besides itself and the base.
_ROOMS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "closeable": set(),
    "ports": set(),
    "replace_file": set(),
    "safe_text": set(),
    "sequences": set(),
    "statistics": set(),
    "untrusted_text": set(),
    "user_folders": set(),
    "_version": set(),
    "answers": {"engine", "routers"},
    "messages": set(),
    "config": set(),
    "catalog": {"config"},
    "ledger": set(),
    "conversation": {"answers"},
    "tokenizers": set(),
    "backend": {"tokenizers"},
    "weights": {"catalog", "tokenizers"},
    "questions": set(),
    "routers": set(),
    "engine": set(),
    "small": {"backend", "catalog", "config", "tokenizers", "weights"},
    "large": {"ledger", "tokenizers"},
    "hosting": {"backend", "large"},
    "terminal_modes": set(),
    "view": {"answers", "terminal_modes"},
    "recorded": {"engine", "routers"},
    "training": {
        *("backend", "catalog", "engine", "questions", "recorded", "routers", "serving", "small"),
    },
    "serving": {
        *("answers", "backend", "config", "engine", "large", "recorded", "routers", "small"),
        "view",
    },
    "bench": {
        "catalog",
        "engine",
        "large",
        "questions",
        "recorded",
        "routers",
        "serving",
        "small",
        "training",
    },
}
# Third parties that stop at these rooms.
_WALLS: dict[str, set[str]] = {
    "mlx": {"small", "backend", "hosting", "weights", "cli", "bench", "training"},
    "mlx_lm": {"small", "backend", "hosting", "tokenizers", "bench", "training"},
    "requests": {"large", "weights", "bench"},
    "rich": {"view", "cli"},
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "wcwidth": {"view"},
    "gguf": {"weights"},
    "numpy": {"weights", "bench"},
    "huggingface_hub": {"weights"},
    "starlette": {"serving", "cli"},
    "uvicorn": {"serving"},
    "h11": {"serving"},
    "prometheus_client": {"serving"},
}


# The wings of `large/`, and which of them each may import besides itself.
_LARGE_WINGS: dict[str, set[str]] = {
    "prompt": set(),
    "reply": set(),
    "http": set(),
    "dialects": {"prompt", "reply"},
    "vocabulary": {"prompt", "reply"},
    "completion_request": {"prompt", "reply", "http", "dialects", "vocabulary"},
}
_LARGE_WINGS["negotiation"] = {*_LARGE_WINGS, "completion_request"}
# What builds on all wings: the client and its parts.
_LARGE_TOP = {
    *("answer_scorer", "client", "neutralised_names", "position_call", "request_plan", "streaming"),
    *("whole_chat", ""),
}
# Modules that stop at these wings of `large/`.
_LARGE_WALLS: dict[str, set[str]] = {
    "json": {"dialects", "completion_request", "negotiation"},
    "requests": {"http"},
    "urllib3": {"http"},
    "http": {"http"},
    "socket": {"http"},
    "ssl": {"http"},
}


def _room(name: str) -> str:
    """Return the room of a module, "" for the package itself and for `python -m mlxroute`."""
    parts = name.split(".")[1:]
    return parts[0] if parts and parts[0] != "__main__" else ""


def _wing(name: str) -> str:
    """Return the wing of a module of `large/`, "" for its `__init__`."""
    return name.removeprefix("mlxroute.large").lstrip(".").split(".")[0]


def _may_import(room: str, name: str) -> bool:
    top = name.split(".")[0]
    if top == "mlxroute":
        target = _room(name)
        return room not in _ROOMS or target == room or target in _BASE | _ROOMS[room]
    return top not in _WALLS or room in _WALLS[top]


def test_rooms_import_only_what_the_design_allows() -> None:
    assert [
        f"{module} must not import {name}"
        for module, path in MODULES.items()
        for name in imports_of(path)
        if not _may_import(_room(module), name)
    ] == []


def _wing_may_import(wing: str, name: str) -> bool:
    top = name.split(".")[0]
    if _room(name) == "large" and wing in _LARGE_WINGS:
        return _wing(name) in {wing} | _LARGE_WINGS[wing]
    return top not in _LARGE_WALLS or wing in _LARGE_WALLS[top]


def test_wings_of_large_import_only_what_the_design_allows() -> None:
    assert [
        f"{module} must not import {name}"
        for module, path in MODULES.items()
        for name in imports_of(path)
        if _room(module) == "large" and not _wing_may_import(_wing(module), name)
    ] == []


def test_every_wing_of_large_has_a_rule() -> None:
    wings = {_wing(name) for name in MODULES if _room(name) == "large"}
    assert wings == _LARGE_WINGS.keys() | _LARGE_TOP


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = [" -> ".join(circle) for circle in circles(module_graph())]
    assert not paths, "\n".join(paths)


def test_no_import_runs_upward() -> None:
    """Rooms form layers: none imports a room that imports it, directly or through others."""
    rooms: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        room = _room(module)
        rooms.setdefault(room, set()).update({_room(name) for name in targets} - {room})
    paths = [" -> ".join(circle) for circle in circles(rooms)]
    assert not paths, "\n".join(paths)
    assert not [room for room, targets in rooms.items() if room and targets & {"", "cli"}]


def test_a_circle_is_found() -> None:
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()}
    (circle,) = circles(graph)
    assert set(circle) == {"a", "b", "c"}
    assert all(target in graph[name] for name, target in itertools.pairwise(circle))


def test_every_room_has_a_rule() -> None:
    free = {"", "cli"}
    assert {_room(name) for name in MODULES} - free == set(_ROOMS)


def _loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(name.split('.')[0] for name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded_by("from mlxroute.cli import main\nmain(['--help'])")
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "requests", "huggingface_hub", "gguf"}
    assert not loaded & (
        heavy | {"prompt_toolkit", "rich", "psutil", "starlette", "uvicorn", "asyncio"}
    )
    # Each of these takes 3 to 10 ms.
    assert not loaded & {"hashlib", "secrets", "tempfile", "tomllib"}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_command_and_no_setting(option: str) -> None:
    script = (
        f"from mlxroute.cli import main\nmain(['{option}'])\nimport sys\n"
        "print(*(n for n in sys.modules if n.startswith(('mlxroute.cli.c', 'mlxroute.config'))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "mlxroute.cli.command_list"


def test_importing_the_package_does_no_work() -> None:
    loaded = _loaded_by("import mlxroute")
    assert not loaded & {"mlx", "requests", "typer", "rich", "numpy"}


def test_what_is_imported_before_a_model_is_loaded_leaves_mlx_out() -> None:
    # MLX uses the faster BLAS only if that is open before MLX is imported.
    commands = sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in (PACKAGE / "cli").rglob("*.py")
    )
    options = ["mlxroute.bench.latency", "mlxroute.bench.plot", "mlxroute.bench.quality"]
    options.append("mlxroute.training.tuning_types")
    names = [*commands, *options, "mlxroute.small", "mlxroute.serving", "mlxroute.hosting.launcher"]
    assert not _loaded_by(f"import {', '.join(names)}") & {"mlx", "mlx_lm"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "small").rglob("*.py")), ids=lambda p: p.name)
def test_small_imports_mlx_at_the_top_of_its_modules(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, functions):
            inside = ast.Module(body=list(node.body), type_ignores=[])
            assert not {name.split(".")[0] for name in imported_names(inside)} & {"mlx", "mlx_lm"}


def test_the_endpoint_is_imported_without_a_model() -> None:
    code = "from mlxroute import ServingSession, create_app"
    assert not _loaded_by(code) & {"mlx", "mlx_lm", "numpy", "requests", "uvicorn"}


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert list(mlxroute.__all__) == sorted(mlxroute.__all__)
    assert set(mlxroute.__all__) <= set(dir(mlxroute))
    for name in mlxroute.__all__:
        assert getattr(mlxroute, name) is not None
