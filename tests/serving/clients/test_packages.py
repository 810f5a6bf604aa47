"""Packages with which programs use the endpoint: OpenAI's two, and LangChain's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.serving.clients.installation import node_client, python_client, run_client

pytestmark = pytest.mark.heavy

_SCRIPTS = Path(__file__).parent / "scripts"


def test_openai_for_python(endpoint: str, home: Path) -> None:
    script = _SCRIPTS / "openai_package.py"
    result = json.loads(run_client([python_client("openai"), script, endpoint], home))
    assert result["models"][0] == "smollm2-135m+smollm2-135m"
    assert result["text"]
    assert result["streamed"] == result["text"]
    assert result["finish_reason"] == "length"
    assert "content.done" in result["events"]
    assert result["streamed_usage"]["completion_tokens"] == 8
    summary, sources = result["summary"], result["sources"]
    assert summary["escalated"] > 0
    assert sources.count("large") == summary["large_tokens"]
    assert len(result["texts"]) == 4
    assert all(result["texts"])
    assert result["cancelled"] == "cancelled"
    assert result["refused"] == [
        ["BadRequestError", "n"],
        ["BadRequestError", "presence_penalty"],
        ["NotFoundError", "model"],
    ]


def test_openai_for_node(endpoint: str, home: Path, tmp_path: Path) -> None:
    # Node looks for packages beside the script.
    folder = node_client("openai")
    script = shutil.copy(_SCRIPTS / "openai_package.mjs", folder)
    result: dict[str, Any] = json.loads(run_client(["node", script, endpoint], home))
    assert result["models"][0] == "smollm2-135m+smollm2-135m"
    assert result["text"]
    assert result["streamed"] == result["read"] == result["text"]
    assert result["completion_tokens"] == 8
    assert result["cancelled"] == "cancelled"
    assert result["refused"] == ["BadRequestError", "n"]


def test_langchain(local_endpoint: str, home: Path) -> None:
    script = _SCRIPTS / "langchain_package.py"
    python = python_client("langchain-openai")
    result = json.loads(run_client([python, script, local_endpoint], home))
    assert result["text"]
    assert result["streamed"] == result["async_streamed"] == result["text"]
    assert result["usage"]["output_tokens"] == 6
    assert [usage["output_tokens"] for usage in result["streamed_usage"]] == [6]
    assert len(result["batch"]) == 3
    assert result["completion"]
    assert result["streamed_completion"] == result["completion"]
    assert "--tools large" in result["refusal"]
