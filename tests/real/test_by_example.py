"""Real servers of which only the chat route is left: asked by example, or refused.

To print all figures:  python -m pytest --heavy -m heavy tests/real/test_by_example.py -s
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.bench.chat_only_server import ChatOnlyServer
from mlxroute.large.negotiation.prober import NoUsableDialect
from mlxroute.small import SmallModel
from mlxroute.types import Mode
from tests.real.servers import Kind, run_server
from tests.support.llama_cpp import needs_llama_cpp

pytestmark = pytest.mark.heavy

SMALL, LARGE, WEAK = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m"
TIMEOUT_S = 600.0
PROMPTS = (
    "Why is the sky blue? Explain in two paragraphs.",
    "Write a JavaScript function that groups an array of objects by a key.",
    "List seven tips for saving energy at home, numbered, with one sentence each.",
)
FRAMING = ("<beginning>", "</beginning>", "Then go on", "this beginning")


@pytest.fixture(
    scope="module", params=[pytest.param(Kind.LLAMA_SERVER, marks=needs_llama_cpp), Kind.MLX_LM]
)
def chat_only(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("server") / "log"
    with (
        run_server(request.param, LARGE, log_path=log_path) as server,
        ChatOnlyServer(server.url) as proxy,
    ):
        yield proxy.url


def test_a_model_that_goes_on_by_example_decides_positions(chat_only: str, tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with LargeModel(chat_only, timeout_s=TIMEOUT_S, verdicts=verdicts) as large:
        verdict = large.probe()
    for check in verdict.checks:
        print(f"{check.name}: {check.passed}, {check.detail}")  # noqa: T201
    assert (verdict.dialect, verdict.rung) == ("completion by example", 5)
    assert verdict.is_approximate
    small = SmallModel.load(SMALL)
    decided = 0
    with LargeModel(chat_only, timeout_s=TIMEOUT_S, verdicts=verdicts) as large:
        for prompt in PROMPTS:
            answer = generate(
                small,
                large,
                prompt,
                router=EntropyRouter(budget=0.07),
                max_tokens=160,
                mode=Mode.WAIT,
                timeout_s=TIMEOUT_S,
            )
            tokens, stats = list(answer), answer.stats()
            print(f"\n{prompt}\n{stats.text}\n")  # noqa: T201
            decided += sum(
                token.escalation is not None and token.escalation.large is not None
                for token in tokens
            )
            assert not any(words in stats.text for words in FRAMING)
            assert "�" not in stats.text
    assert decided >= 10


@needs_llama_cpp
def test_a_weak_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with (
        run_server(Kind.LLAMA_SERVER, WEAK, log_path=tmp_path / "log") as server,
        ChatOnlyServer(server.url) as proxy,
        LargeModel(proxy.url, timeout_s=TIMEOUT_S) as large,
        pytest.raises(NoUsableDialect) as caught,
    ):
        large.probe()
    text = str(caught.value)
    print(text)  # noqa: T201
    assert text.startswith("the server only chats, and its model does not continue")
    assert "use a stronger model" in text
    assert "\n" not in text
