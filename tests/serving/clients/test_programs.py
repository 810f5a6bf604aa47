"""Programs that people use the endpoint with: `llm`, aider and Continue's `cn`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.clients.endpoint_process import run_server
from tests.serving.clients.installation import node_client, python_client, run_client

pytestmark = pytest.mark.heavy

_CONTINUE_CONFIG = """
name: local
version: 1.0.0
schema: v1
models:
  - name: mlxroute
    provider: openai
    model: mlxroute
    apiBase: {address}
    apiKey: none
    roles: [chat]
    defaultCompletionOptions:
      maxTokens: 12
"""
# Small models copy aider's reminder of the format instead of following it.
_AIDER_SETTINGS = """
- name: openai/mlxroute
  edit_format: whole
  use_repo_map: false
  reminder: null
"""


def test_llm(local_endpoint: str, home: Path) -> None:
    llm = python_client("llm", "llm")

    def ask(*arguments: str) -> str:
        return run_client([llm, "openai", "endpoint", local_endpoint, *arguments], home).strip()

    assert ask("--models").splitlines() == ["smollm2-135m", "smollm2-135m:small"]
    question = ("-m", "mlxroute", "-o", "max_tokens", "6", "Say hello.")
    streamed = ask(*question)
    assert streamed
    assert ask(*question, "--no-stream") == streamed


@pytest.fixture
def continue_config(endpoint: str, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(_CONTINUE_CONFIG.format(address=endpoint), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--exclude", "*"), id="without-tools"),
        # The large model's server answers these.
        pytest.param((), id="with-tools"),
    ],
)
def test_continue(continue_config: Path, home: Path, flags: tuple[str, ...]) -> None:
    cn = node_client("continue") / "node_modules" / ".bin" / "cn"
    command = [cn, "-p", "--config", continue_config, *flags, "Say hello."]
    assert run_client(command, home).strip()


@pytest.fixture
def coder_endpoint(tmp_path: Path) -> Iterator[str]:
    """Qwen2.5-Coder-0.5B, which asks Qwen2.5-Coder-1.5B for up to half of the tokens."""
    with (
        run_server(tmp_path, "host", "qwen2.5-coder-1.5b") as large,
        run_server(
            tmp_path,
            "serve",
            *("--small", "qwen2.5-coder-0.5b", "--large", large, "--budget", "50%"),
            *("--timeout", "300", "--port", "0"),
        ) as address,
    ):
        yield address


def test_aider_edits_a_file(coder_endpoint: str, home: Path, tmp_path: Path) -> None:
    aider = python_client("aider-chat", "aider")
    repository = tmp_path / "repository"
    repository.mkdir()
    file = repository / "greet.py"
    file.write_text('def greet():\n    return "hello"\n', encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    flags = "--no-auto-commits --no-gitignore --yes-always --no-check-update --analytics-disable"
    flags += " --no-show-model-warnings --no-pretty"
    settings = tmp_path / "settings.yml"
    settings.write_text(_AIDER_SETTINGS, encoding="utf-8")
    run_client(
        [
            aider,
            *("--model", "openai/mlxroute", "--model-settings-file", settings, *flags.split()),
            *("--message", 'Change the text that greet returns to "goodbye".', file),
        ],
        home,
        cwd=repository,
        OPENAI_API_BASE=coder_endpoint,
        OPENAI_API_KEY="none",
    )
    assert file.read_text(encoding="utf-8") == 'def greet():\n    return "goodbye"\n'
