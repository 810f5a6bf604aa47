"""Limits on the size of modules, functions and folders, and on names."""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlxroute

_PACKAGE = Path(mlxroute.__file__).parent
_TESTS = Path(__file__).parent
_MAX_MODULE_LINES = 400
_MAX_FUNCTION_LINES = 45
_MAX_FILES = 15
_PARSERS = {"json.load", "json.loads", "tomllib.load", "tomllib.loads"}
# Modules that read text which is no file of a user, and the door itself.
_TEXT_READERS = {
    "untrusted_text.py": "the door",
    "ledger.py": "a request body of this program",
    "bench/chat_only_server.py": "a request body of this program",
    "bench/delayed_server.py": "a request body of this program",
    "backend/blas.py": "an error message",
    "backend/memory.py": "files of the kernel",
    "weights/hub.py": "an error message",
    "hosting/child_log.py": "the log of a child",
    "large/dialects/sse.py": "the door of streamed replies",
    "cli/standard_streams.py": "the null device",
    "serving/http/endpoint_app.py": "a file of this package",
    "serving/http/parsing/request_body.py": "the door of requests",
    "view/answer_html.py": "a file of this package",
    "serving/http/page/chat_page.py": "a file of this package",
}
# They name no content.
_EMPTY_NAMES = {"found", "each", "told", "seen", "wanted"}


@pytest.fixture(scope="module", autouse=True)
def _no_collections() -> Iterator[None]:
    """The trees are kept, so that looking for garbage would take most of the time."""
    gc.disable()
    yield
    gc.enable()


def _modules(root: Path = _PACKAGE) -> list[Path]:
    return sorted(root.rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines after the signature and the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def _text_readers(tree: ast.Module) -> Iterator[str]:
    """Yield the calls of a module that read text or parse it, or split it at other characters."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        mode = next((ast.unparse(item) for item in node.args if isinstance(item, ast.Constant)), "")
        is_open = name == "open" or name.endswith(".open")
        is_binary = name.startswith(("os.", "archive.")) or "b" in mode or "w" in mode
        is_parser = name.endswith((".splitlines", ".read_text")) or name in _PARSERS
        if is_parser or (is_open and not is_binary):
            yield f"{node.lineno} {name}"


def _bound_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(_PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in _modules()
    }
    assert {path: n for path, n in lengths.items() if n > _MAX_MODULE_LINES} == {}


def test_no_function_is_longer_than_45_lines() -> None:
    lengths = {
        f"{path.relative_to(_PACKAGE)}:{node.lineno} {node.name}": _body_lines(node)
        for path in _modules()
        for node in _functions(path)
    }
    assert {name: n for name, n in lengths.items() if n > _MAX_FUNCTION_LINES} == {}


def test_no_folder_has_more_than_15_modules() -> None:
    counts = Counter(path.parent for path in _modules() if path.name != "__init__.py")
    counts = Counter({folder: n for folder, n in counts.items() if "cli" not in folder.parts})
    assert {str(folder): n for folder, n in counts.items() if n > _MAX_FILES} == {}


def test_no_two_modules_have_one_name() -> None:
    counts = Counter(path.name for path in _modules() if path.name != "__init__.py")
    assert {name: n for name, n in counts.items() if n > 1} == {}


def test_no_two_public_classes_have_one_name() -> None:
    counts = Counter(
        node.name
        for path in _modules()
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name: n for name, n in counts.items() if n > 1} == {}


def test_text_from_outside_is_read_in_one_place() -> None:
    readers = {
        str(path.relative_to(_PACKAGE)): list(_text_readers(_tree(path))) for path in _modules()
    }
    assert {
        path: calls for path, calls in readers.items() if calls and path not in _TEXT_READERS
    } == {}


def test_no_name_is_empty_of_content() -> None:
    names = [
        f"{path.name}:{line} {name}"
        for root in (_PACKAGE, _TESTS)
        for path in _modules(root)
        for name, line in _bound_names(_tree(path))
        if name.strip("_") in _EMPTY_NAMES
    ]
    assert names == []


def test_every_module_class_and_public_function_has_a_docstring() -> None:
    missing = []
    for path in _modules():
        tree = _tree(path)
        where = str(path.relative_to(_PACKAGE))
        if tree.body and ast.get_docstring(tree) is None and path.name != "_version.py":
            missing.append(where)
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name[0] == "_":
                continue
            if ast.get_docstring(node) is None:
                missing.append(f"{where}:{node.lineno} {node.name}")
    assert missing == []
