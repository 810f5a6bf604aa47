"""Three real OpenAI-compatible servers give their own greedy answers, token for token.

To print all figures:  python -m pytest --heavy -m heavy tests/real/test_servers.py -s
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.small import SmallModel
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.types import LargeToken, Mode, RunStats, StopReason, Token
from tests.real.conftest import PROMPTS
from tests.real.exact import (
    chat_answer,
    first_difference,
    greedy_answer,
    near_tie_nats,
    top_gap,
)
from tests.real.servers import Kind, RunningServer, model_directory, run_server
from tests.support.llama_cpp import needs_llama_cpp

SMALL, LARGER = "smollm2-135m", "qwen2.5-coder-0.5b"
BRIDGE_PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parent / "bridge_prompts.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
RUNGS = {
    Kind.LLAMA_SERVER: (1, "llama-server completion"),
    Kind.VLLM: (1, "vLLM completions"),
    Kind.MLX_LM: (2, "mlx_lm completions"),
}
# How much logprobs differ between a batch and a single row: llama-server has Q4_1 weights and
# rounds activations to 8 bits, vLLM computes in float32. For mlx_lm see `near_tie_nats`.
NEAR_TIE_NATS = {Kind.LLAMA_SERVER: 0.1, Kind.VLLM: 0.01}
TIMEOUT_S = 120.0

Summaries = dict[str, list[str]]


def say(line: str) -> None:
    print(f"\n{line}", end="", flush=True)  # noqa: T201


@pytest.fixture(scope="module")
def summaries() -> Iterator[Summaries]:
    """One line of figures for each server, printed at the end of the module."""
    lines: Summaries = {}
    yield lines
    for server, figures in lines.items():
        say(f"{server}: {'; '.join(figures)}")
    say("")


def servers_of(model: str, *, heavy: bool) -> Callable[..., RunningServer]:
    """Return a fixture that serves `model` with each program in turn; vLLM is always heavy."""
    params = []
    for kind in Kind:
        marks = [pytest.mark.heavy] if heavy or kind is Kind.VLLM else []
        marks += [needs_llama_cpp] if kind is Kind.LLAMA_SERVER else []
        params.append(pytest.param(kind, marks=marks))

    @pytest.fixture(scope="module", params=params)
    def server(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[RunningServer]:
        log_path = tmp_path_factory.mktemp("server") / "log"
        with run_server(request.param, model, log_path=log_path) as running:
            yield running

    return server


server = servers_of(SMALL, heavy=False)
larger_server = servers_of(LARGER, heavy=True)


@pytest.fixture(scope="module")
def large(server: RunningServer) -> Iterator[LargeModel]:
    """One client for the short tests: to probe a server costs more than an answer."""
    with client_of(server) as client:
        yield client


def escalate_always(
    small: SmallModel, large: LargeModel, prompt: str, *, count: int, prefetch: int = 0
) -> tuple[list[Token], RunStats]:
    """Take every token from the large model; a failed call fails the test."""
    answer = generate(
        small,
        large,
        prompt,
        router=EntropyRouter(-math.inf),
        max_tokens=count,
        timeout_s=TIMEOUT_S,
        strict=True,
        mode=Mode.WAIT,
        prefetch=prefetch,
    )
    tokens = list(answer)
    assert "�" not in answer.stats().text
    assert "<|" not in answer.stats().text
    return tokens, answer.stats()


def client_of(server: RunningServer) -> LargeModel:
    """Return a client as the command line makes it.

    mlx_lm.server has no tokenise route, so the tokenizer comes from the model's files.
    """
    tokenizer = None
    if server.kind is Kind.MLX_LM:
        tokenizer = ChatTokenizer.load(model_directory(server.model), name=server.model)
    return LargeModel(server.url, timeout_s=TIMEOUT_S, find_tokenizer=lambda name: tokenizer)


def calls_of(tokens: list[Token]) -> list[LargeToken]:
    escalations = [token.escalation for token in tokens if token.escalation is not None]
    return [escalation.large for escalation in escalations if escalation.large is not None]


def test_the_first_question_finds_the_servers_dialect(
    server: RunningServer, large: LargeModel
) -> None:
    assert RUNGS[server.kind][1] in large.connect(thorough=False)


# By default `mlxroute ask` probes llama-server in test_answers; other tests probe tiny models.
@pytest.mark.heavy
def test_the_probe_finds_the_best_rung(
    server: RunningServer, large: LargeModel, summaries: Summaries
) -> None:
    verdict = large.probe()
    checks = [f"{check.name} {check.passed}" for check in verdict.checks]
    say(f"{server.kind}: {verdict.dialect}, {verdict.requests} calls; {', '.join(checks)}")
    assert (verdict.rung, verdict.dialect) == RUNGS[server.kind]
    summaries.setdefault(server.kind, []).append(f"rung {verdict.rung} in {verdict.requests} calls")


def check_greedy_answers(
    small: SmallModel,
    large: LargeModel,
    server: RunningServer,
    prompts: list[str],
    *,
    count: int,
    prefetch: int = 0,
) -> str:
    """Always escalating gives the server's own answers except at near-ties; return how many."""
    equal = 0
    for prompt in prompts:
        tokens, stats = escalate_always(small, large, prompt, count=count, prefetch=prefetch)
        assert bool(prefetch) == bool(stats.prefetch_used)
        equal += is_greedy_answer(small, server, prompt, tokens, count=count)
    return f"{equal} of {len(prompts)} answers equal token for token, the others near-ties"


def is_greedy_answer(
    small: SmallModel, server: RunningServer, prompt: str, tokens: list[Token], *, count: int
) -> bool:
    """Return whether these are the server's own tokens; False if they differ after a near-tie."""
    text = small.encode_conversation([{"role": "user", "content": prompt}]).text
    expected = greedy_answer(server, text, count)
    difference = first_difference(tokens, expected)
    if difference is None:
        assert len(tokens) == len(expected), prompt
        return True
    index, gap = difference
    say(f"{server.kind}: {prompt!r} differs at token {index}: top-2 gap {gap:.4f} nats")
    is_mlx_lm = server.kind is Kind.MLX_LM
    limit = near_tie_nats(small) if is_mlx_lm else NEAR_TIE_NATS[server.kind]
    assert gap < limit, (prompt, index, gap)
    return False


def test_characters_of_several_tokens_are_the_servers_own_and_arrive_whole(
    server: RunningServer, large: LargeModel, smollm2: SmallModel
) -> None:
    prompt = "Say only 🦊."
    tokens, stats = escalate_always(smollm2, large, prompt, count=4)
    assert "🦊" in stats.text
    assert any(token.text == "" for token in tokens[:-1]), "no character took several tokens"
    is_greedy_answer(smollm2, server, prompt, tokens, count=4)


def test_the_end_of_the_answer_is_the_servers_own(
    server: RunningServer, large: LargeModel, smollm2: SmallModel
) -> None:
    prompt = "Say only the word yes."
    tokens, stats = escalate_always(smollm2, large, prompt, count=48)
    assert stats.finish_reason is StopReason.EOS
    assert tokens[-1].text == ""
    is_greedy_answer(smollm2, server, prompt, tokens, count=48)


@pytest.mark.heavy
def test_tokens_ahead_are_the_servers_own_streamed_or_not(
    server: RunningServer, large: LargeModel, smollm2: SmallModel
) -> None:
    prompts = [PROMPTS[4], "Repeat exactly: 🦊🦊🦊🦊"]
    check_greedy_answers(smollm2, large, server, prompts, count=32, prefetch=7)
    large.connect()
    assert large.can_stream == (server.kind is not Kind.MLX_LM)


@pytest.mark.heavy
def test_always_escalating_gives_the_servers_own_answers_to_ten_prompts(
    server: RunningServer, large: LargeModel, smollm2: SmallModel, summaries: Summaries
) -> None:
    figure = check_greedy_answers(smollm2, large, server, PROMPTS[:10], count=48)
    summaries.setdefault(server.kind, []).append(figure)


@pytest.mark.heavy
def test_200_escalations_leave_the_server_alive_and_cost_the_same_late_and_early(
    server: RunningServer, smollm2: SmallModel, summaries: Summaries
) -> None:
    before = server.counters()
    early = consecutive(smollm2, server, words=3)
    late = consecutive(smollm2, server, words=350)
    after = server.counters()
    assert server.is_alive()
    cached = sum(call.cached_tokens or 0 for call in early + late)
    if before is not None and after is not None:
        cached = after.cached_tokens - before.cached_tokens
    sent = sum(call.prompt_tokens or 0 for call in early + late)
    prefixes = [
        statistics.median(call.prompt_tokens or 0 for call in calls) for calls in (early, late)
    ]
    times = [statistics.median(call.latency_s for call in calls[1:]) for calls in (early, late)]
    figure = (
        f"{len(early + late)} calls, median {times[0] * 1e3:.1f} ms at a prefix of "
        f"{prefixes[0]:.0f}, {times[1] * 1e3:.1f} ms at {prefixes[1]:.0f}; "
        f"{cached} of {sent} prompt tokens cached"
    )
    say(f"{server.kind}: {figure}")
    summaries.setdefault(server.kind, []).append(figure)
    assert cached > 0.9 * sent
    assert times[1] <= 2 * times[0]


def consecutive(small: SmallModel, server: RunningServer, *, words: int) -> list[LargeToken]:
    """Make a hundred escalations; the prompt has 40 tokens and four more for each of `words`."""
    prompt = "Tell a long story with these words: " + "apple pear plum, " * words
    calls: list[LargeToken] = []
    with client_of(server) as large:
        while len(calls) < 100:
            tokens, _ = escalate_always(
                small, large, f"{prompt} {len(calls)}", count=100 - len(calls)
            )
            calls += calls_of(tokens)
    return calls


@pytest.mark.heavy
def test_another_vocabulary_gives_the_large_models_own_text(
    larger_server: RunningServer, smollm2: SmallModel, summaries: Summaries
) -> None:
    server = larger_server
    same = 0
    with client_of(server) as large:
        for prompt in BRIDGE_PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            expected, ended = chat_answer(server, messages, 48)
            tokens, stats = escalate_always(smollm2, large, prompt, count=48)
            index = first_different_character(stats, expected, ended)
            if index is None:
                same += 1
                continue
            say(
                f"{server.kind}: {prompt!r} differs at character {index}, top-2 gap "
                f"{gap_at(tokens, index):.4f} nats: {stats.text[index : index + 20]!r} "
                f"instead of {expected[index : index + 20]!r}"
            )
    figure = f"another vocabulary: {same} of {len(BRIDGE_PROMPTS)} texts the large model's own"
    say(f"{server.kind}: {figure}")
    summaries.setdefault(server.kind, []).append(figure)
    assert same >= 9


def first_different_character(stats: RunStats, expected: str, ended: bool) -> int | None:
    """Return the first character that differs from the large model's own answer, or None.

    Where the token limit cut one answer, the other may be longer.
    """
    text = stats.text
    for index, (actual, own) in enumerate(zip(text, expected, strict=False)):
        if actual != own:
            return index
    too_short = len(text) < len(expected) and stats.finish_reason is not StopReason.LENGTH
    too_long = len(text) > len(expected) and ended
    return min(len(text), len(expected)) if too_short or too_long else None


def gap_at(tokens: list[Token], index: int) -> float:
    """Return the top-2 gap of the call that wrote the character at `index`."""
    length, gap = 0, math.inf
    for token in tokens:
        gap = top_gap(token) if token.escalation else gap
        length += len(token.text)
        if length > index:
            break
    return gap
