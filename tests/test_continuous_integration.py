"""The workflow on a Mac: a failed command or a bad report fails it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[1]
_WORKFLOW = _ROOT / ".github" / "workflows" / "ci.yml"
_RESULTS = _ROOT / "bench" / "results"


def test_the_source_distribution_has_the_files_that_these_tests_read() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"tests", ".ci", ".github", "bench"} <= set(included)


def check(kernels: dict[str, Any], speed: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Return the exit code and the stderr of the check of two reports."""
    files = [folder / "kernels.json", folder / "speed.json"]
    for file, report in zip(files, (kernels, speed), strict=True):
        file.write_text(f"{json.dumps(report)}\n", encoding="utf-8")
    command = [sys.executable, str(_ROOT / ".ci" / "check_mac_reports.py"), *map(str, files)]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stderr


def reports_of_a_mac() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return reports as of a Mac where all is well, made from those of a machine without Metal."""
    kernels = json.loads((_RESULTS / "kernels.json").read_text(encoding="utf-8"))
    speed = json.loads((_RESULTS / "speed-smollm2-135m.json").read_text(encoding="utf-8"))
    assert kernels["metal"] != "in use"
    for entry in kernels["kernels"]:
        entry["error"]["metal"] = copy.deepcopy(entry["error"]["graph"])
    return kernels | {"metal": "in use"}, speed


def test_a_failed_command_of_a_pipe_fails_its_step() -> None:
    text = _WORKFLOW.read_text(encoding="utf-8")
    assert re.search(r"run: .*\|", text)
    assert "\ndefaults:\n  run:\n    shell: bash\n" in text
    assert set(re.findall(r"shell: (.*)", text)) == {"bash"}


def test_the_workflow_checks_the_reports_that_it_writes() -> None:
    lines = re.findall(r"run: (.*)", _WORKFLOW.read_text(encoding="utf-8"))
    written = [line.split("tee ")[1] for line in lines if "tee " in line]
    assert lines[-1] == f"python .ci/check_mac_reports.py {' '.join(written)}"


def test_reports_with_the_metal_kernel_and_the_same_tokens_pass(tmp_path: Path) -> None:
    assert check(*reports_of_a_mac(), tmp_path) == (0, "")


def _other_ids(kernels: dict[str, Any], speed: dict[str, Any]) -> None:
    kernels["kernels"][-1]["error"]["metal"]["same_top_ids"] = False


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda kernels, speed: kernels.update(metal="it is wrong on ties"), "wrong on ties"),
        (_other_ids, "metal kernel has other top ids at a vocabulary of 262144"),
        (lambda kernels, speed: speed.update(same_tokens=False), "wrote different tokens"),
    ],
)
def test_a_report_with_a_fault_fails_the_workflow(
    tmp_path: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    kernels, speed = reports_of_a_mac()
    spoil(kernels, speed)
    code, stderr = check(kernels, speed, tmp_path)
    assert code == 1
    assert message in stderr
