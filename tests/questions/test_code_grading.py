"""Questions that ask for code: the program of an answer, its tests, and the isolated process."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.questions import code_sandbox
from mlxroute.questions.code_grading import extract_program
from mlxroute.questions.code_sandbox import run_program
from mlxroute.questions.grading import Grade, extract_answer, grade
from mlxroute.questions.question_files import (
    AnswerKind,
    FunctionTask,
    Question,
    question_messages,
    read_questions,
)

_START = 'import math\n\ndef helper(x):\n    return x\n\ndef half(x):\n    """Halve x."""\n'
_ROW = {
    "task_id": "Set/7",
    "prompt": _START,
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(3) == 1.5\n",
}
_FUNCTION = FunctionTask("half", _START, _ROW["test"])
# Tries to make the folder's file systems writable again: MS_REMOUNT | MS_BIND.
_REMOUNT = """
import ctypes, os, pathlib
for path in pathlib.Path("{folder}").parents:
    ctypes.CDLL(None).mount(b"none", str(path).encode(), None, 32 | 4096, None)
"""
_GOOD, _BAD = "def half(x):\n    return helper(x) / 2", "def half(x):\n    return x // 2"

_NEVER_SET_UP = "import time; time.sleep(60)"
_DOCUMENTED = '''def half(x):
    """Halve x:
    ```
    half(4)
    ```
    """
    return x / 2'''


@pytest.fixture(scope="module", autouse=True)
def _isolation() -> None:
    try:
        run_program("")
    except UsageError as exc:
        if sys.platform != "linux":
            raise
        pytest.skip(str(exc))


@pytest.fixture
def question(tmp_path: Path) -> Question:
    file = tmp_path / "code.jsonl"
    file.write_text(json.dumps(_ROW) + "\n")
    return read_questions(file)[0]


def test_a_function_to_complete_is_read(question: Question) -> None:
    assert (question.name, question.kind) == ("Set/7", AnswerKind.CODE)
    assert question.function == _FUNCTION
    (message,) = question_messages(question)
    assert message["content"].startswith("Complete this function:\n```python\nimport math\n")
    assert message["content"].endswith("the whole function in one Python code block.")


@pytest.mark.parametrize("row", [{"test": ""}, {"entry_point": "double"}, {"entry_point": 3.5}])
def test_a_wrong_row_is_named(row: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text(json.dumps({**_ROW, **row}) + "\n")
    with pytest.raises(UsageError, match="row 1"):
        read_questions(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Here:\n```python\n{_GOOD}\n```\nDone.", Grade(True, True)),
        (f"```\n{_GOOD}\n```", Grade(True, True)),
        (f"```python\n{_BAD}\n```", Grade(False, False)),
        (f"```python\nprint(1)\n```\nthen\n```python\n{_GOOD}\n```", Grade(True, True)),
        # Cut off inside the block, without a block, and the body alone.
        (f"```python\n{_GOOD}\n", Grade(None, True)),
        (_GOOD, Grade(None, True)),
        ("    return x / 2\n", Grade(None, True)),
        ("```python\n    return x / 2\n```", Grade(None, True)),
        ("I cannot do that.", Grade(None, False)),
        ("```python\ndef half(x:\n```", Grade(False, False)),
        (" \n", Grade(None, None)),
        # Other blocks, and other ways to write a block.
        (f"```bash\npip install x\n```\n```python3\n{_GOOD}\n```", Grade(True, True)),
        (f"```text\nhalf(4) = 2\n```\n```python title='a.py'\n{_GOOD}\n```", Grade(True, True)),
        (f"~~~python\n{_GOOD}\n~~~", Grade(True, True)),
        (f"~~~\n```\n~~~\n````py\n{_GOOD}\n````", Grade(True, True)),
        (f"```python\n{_GOOD}\n```".replace("\n", "\r\n"), Grade(True, True)),
        ("1. Halve:\n\n" + indent(f"```python\n{_GOOD}\n```", "   "), Grade(True, True)),
        (f"- ```python\n{indent(_GOOD, '  ')}\n  ```", Grade(True, True)),
        (f"Here: ```python\n{_GOOD}```", Grade(True, True)),
        (f"```python\n{_START}```\nin full:\n```python\n{_GOOD}\n```", Grade(True, True)),
        (f"```python\n{_GOOD}\n```\nso\n```python\nhalf(4)\n```", Grade(True, True)),
        (f"```python\n{_GOOD}\n```\nbut\n```python\n{_BAD}\n```", Grade(False, False)),
        (f"```python\n{_GOOD}\n``` This halves x.", Grade(True, True)),
        (f"````markdown\n```python\n{_GOOD}\n```\n````", Grade(True, True)),
        # Imports that have to come first, and fences within a docstring.
        (
            f"```python\nfrom __future__ import annotations\nimport re\n{_GOOD}\n```",
            Grade(True, True),
        ),
        (f"from __future__ import (\n    division,\n)\n{_GOOD}", Grade(None, True)),
        (f"```python\n{_DOCUMENTED}\n```\nDone.", Grade(True, True)),
        (f"```python\n{_DOCUMENTED}\n```\nso\n```python\n{_BAD}\n```", Grade(False, False)),
        (f'```\n{_GOOD}\n```\n```\nhalf("""4\n```\nor\n```\n5)\n```', Grade(True, True)),
        # Text before code that is in no block.
        (f"Here it is:\n{_GOOD}", Grade(None, True)),
        (f"From a list:\n\nimport math\n\n\n{_GOOD}", Grade(None, True)),
        (f"Here it is:\n\n{indent(_GOOD, '    ')}\n", Grade(None, True)),
        ('def half(x):\n    """\n  Less indented.\n    """\n    return x / 2', Grade(None, True)),
    ],
)
def test_code_is_graded_by_its_tests(text: str, expected: Grade, question: Question) -> None:
    assert grade(question, text) == expected
    outcome = {None: "", True: "passed", False: "failed"}[expected.lenient]
    assert extract_answer(question, text) == outcome


def test_helpers_of_the_start_are_kept() -> None:
    program = extract_program(_FUNCTION, f"```python\n{_GOOD}\n```", strict=True)
    assert program is not None
    assert program.startswith("import math\n\ndef helper(x):")
    assert program.count("def half(") == 1


@given(
    st.sampled_from(["", "Birds fly.\n\n", "```bash\nls\n```\n", "~~~\n```python\n~~~\n", "`x`\n"]),
    st.sampled_from(["```", "````", "~~~"]),
    st.text(alphabet=st.characters(exclude_characters="`~\r\n"), max_size=12),
    st.sampled_from(["", " ", "    ", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\nDone.", "\n```\nhalf(4)\n```"]),
)
def test_a_block_is_read_whatever_its_fence_says(
    before: str, fence: str, info: str, margin: str, newline: str, after: str
) -> None:
    block = indent(f"{fence}{info}\n{_GOOD}\n{fence}", margin)
    text = f"{before}{block}{after}".replace("\n", newline)
    for strict in (True, False):
        program = extract_program(_FUNCTION, text, strict=strict)
        assert program is not None
        assert program.rstrip() == _START[: _START.index("def half")] + _GOOD


_LINES = st.sampled_from(["```", "```python", "~~~", "  ````", _GOOD, "def half(", "@x", "  x", ""])


@given(st.lists(st.one_of(_LINES, st.text(max_size=9)), max_size=12).map("\n".join))
def test_any_text_gives_a_program_or_none(text: str) -> None:
    program = extract_program(_FUNCTION, text, strict=True)
    assert program is None or program.count("def half(") >= 1
    lenient = extract_program(_FUNCTION, text, strict=False)
    assert (lenient is None) is (not text.strip())


@pytest.mark.parametrize(
    "program",
    [
        "raise ValueError",
        "def f(:",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "x = bytearray(3 << 30)",
        "open('here', 'w')",
        "import os\nos.rmdir('{folder}')",
        "import os\nos.chmod('{folder}', 0)",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)",
        "import os\nassert os.environ.get('HOME')",
        _REMOUNT + "os.rmdir('{folder}')",
        _REMOUNT + "open('{folder}/file', 'w')",
    ],
)
def test_programs_that_fail_or_reach_outside(program: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run_program(
            program.replace("{folder}", str(folder)).replace("{port}", str(port))
        )
    assert os.access(folder, os.W_OK)


def test_programs_that_run_to_their_end() -> None:
    assert run_program("import math, re, typing\nprint('a' * 100_000)\nassert math.pi > 3")
    assert run_program("x = '\ud800'")


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_a_program_runs_with_the_future_features_that_it_names(future: str) -> None:
    annotated = "def f(x: List[int]) -> List[int]:\n    return x\nassert f([1]) == [1]"
    assert run_program(future + annotated) is bool(future)
    data_class = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)"
    assert run_program(future + data_class)
    hints = "import typing\nclass A:\n    x: int\nassert typing.get_type_hints(A) == {'x': int}"
    assert run_program(future + hints)


def test_a_program_that_never_ends_is_ended() -> None:
    began_s = time.monotonic()
    assert not run_program("import time\ntime.sleep(60)", timeout_s=1)
    assert time.monotonic() - began_s < 20


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are a part of Linux")
def test_a_program_has_no_capabilities() -> None:
    assert run_program("""
import ctypes
libc = ctypes.CDLL(None)
assert libc.mount(b"none", b"/", None, 32 | 4096, None) == -1
assert libc.unshare(0x10000000) == -1
capabilities = [line for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))]
assert [int(line.split()[1], 16) for line in capabilities] == [0, 0]
""")


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are a part of Linux")
def test_a_program_cannot_end_other_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert not run_program(f"import os\nos.kill({other.pid}, 9)")
        assert other.poll() is None
        other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are a part of Linux")
def test_no_shared_memory_outlives_the_program() -> None:
    key = secrets.randbelow(1 << 30) + 1
    assert run_program(f"import ctypes\nassert ctypes.CDLL(None).shmget({key}, 1, 0o1600) != -1")
    libc = ctypes.CDLL(None)
    segment = libc.shmget(key, 1, 0)
    if segment != -1:
        remove = 0
        libc.shmctl(segment, remove, None)
    assert segment == -1


@pytest.mark.parametrize("session", ["", "os.setsid()"])
def test_no_process_outlives_the_program_that_started_it(session: str) -> None:
    mark = secrets.token_hex()
    run_program(
        f"""
import os, sys, time
if os.fork() == 0:
    {session}
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"])
time.sleep(0.5)
""",
        timeout_s=5,
    )
    survivors = [
        process
        for process in psutil.process_iter(["cmdline"])
        if mark in (process.info["cmdline"] or ())
    ]
    for process in survivors:
        process.kill()
    assert survivors == []


def test_nothing_is_run_without_isolation(
    monkeypatch: pytest.MonkeyPatch, question: Question
) -> None:
    monkeypatch.setattr(code_sandbox, "_run_child", lambda *_: b"isolation: no namespace")
    with pytest.raises(UsageError, match=r"only in isolation.*: no namespace"):
        grade(question, "```python\ndef half(x):\n    return x * 0.5\n```")


@pytest.mark.parametrize(
    ("set_up", "reason"),
    [
        ("import sys; sys.exit(1)", "its process did not start"),
        ("import os; os.kill(os.getpid(), 9)", "its process did not start"),
        (_NEVER_SET_UP, "its process did not start"),
        (
            "import os, runpy\n"
            "def fail(*_): raise PermissionError(1, 'no null device')\n"
            "os.open = fail\n"
            f"runpy.run_path({str(code_sandbox._CHILD)!r}, run_name='__main__')",
            "no null device",
        ),
    ],
)
def test_a_child_that_cannot_be_set_up_gives_no_grade(
    set_up: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    child.write_text(set_up)
    monkeypatch.setattr(code_sandbox, "_CHILD", child)
    with pytest.raises(UsageError, match=f"only in isolation.*: {reason}$"):
        run_program("", timeout_s=0.2 if set_up == _NEVER_SET_UP else 60)


def test_a_child_that_cannot_be_started_gives_no_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(UsageError, match=r"only in isolation.*: /no/python: No such file or dir"):
        run_program("")


def test_a_program_cannot_report_that_it_is_not_isolated() -> None:
    assert not run_program("import os\nfor n in range(3, 9):\n    os.write(n, b'isolation: no')")
