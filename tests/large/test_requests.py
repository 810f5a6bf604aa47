"""Each dialect's request, key by key."""

from __future__ import annotations

from typing import Any

import pytest

from mlxroute.large.dialects import LADDER, Dialect, RequestOptions, get_dialect, prefer_ids
from mlxroute.large.dialects.chat.framing import frame
from mlxroute.large.prompt import Prompt, PromptForm
from tests.support.prompt_forms import CHAT, IDS, QUESTION, prompt_for

ANSWER_START: dict[str, Any] = {"role": "assistant", "content": "He"}
SAMPLING = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
LIMITS = {"max_tokens": 2, "temperature": 0}
LOGPROBS = {"logprobs": True, "top_logprobs": 7}
FLAGS = {"continue_final_message": True, "add_generation_prompt": False}

REQUESTS: dict[str, dict[str, Any]] = {
    "llama-server completion": {
        "prompt": [5, 6],
        "n_predict": 2,
        "n_probs": 7,
        "temperature": 0,
        "samplers": ["temperature"],
        "cache_prompt": True,
        "return_tokens": True,
        "response_fields": [
            *("content", "tokens", "stop_type", "completion_probabilities"),
            *("tokens_evaluated", "tokens_predicted", "timings", "truncated"),
        ],
        "model": "m",
    },
    "vLLM completions": {
        "prompt": [5, 6],
        **LIMITS,
        **SAMPLING,
        "logprobs": 7,
        "return_token_ids": True,
        "return_tokens_as_token_ids": False,
        "model": "m",
    },
    "SGLang generate": {
        "input_ids": [5, 6],
        "sampling_params": {"max_new_tokens": 2, "temperature": 0, **SAMPLING},
        "return_logprob": True,
        "top_logprobs_num": 7,
        "return_text_in_logprobs": True,
    },
    "TGI generate": {
        "inputs": "He",
        "parameters": {"max_new_tokens": 2, "do_sample": False, "details": True, "top_n_tokens": 5},
    },
    "mlx_lm completions": {"prompt": "He", **LIMITS, **LOGPROBS, "model": "m"},
    "Ollama generate": {
        "prompt": "He",
        "raw": True,
        "stream": False,
        "truncate": False,
        **LOGPROBS,
        "think": False,
        "options": {"num_predict": 2, "temperature": 0, "repeat_penalty": 1.0},
        "model": "m",
    },
    "OpenAI completions": {"prompt": "He", **LIMITS, "logprobs": 7, "model": "m"},
    "OpenAI completions, text only": {"prompt": "He", **LIMITS, "model": "m"},
    "chat continuation (flags)": {
        "messages": [QUESTION, ANSWER_START],
        **LIMITS,
        **LOGPROBS,
        **FLAGS,
        "chat_template_kwargs": {"enable_thinking": False},
        "model": "m",
    },
    "chat continuation (prefix)": {
        "messages": [QUESTION, ANSWER_START | {"prefix": True}],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (trailing turn, echoing)": {
        "messages": [QUESTION, ANSWER_START],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (trailing turn)": {
        "messages": [QUESTION, ANSWER_START],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (prefix, echoing, text only)": {
        "messages": [QUESTION, ANSWER_START | {"prefix": True}],
        **LIMITS,
        "model": "m",
    },
    "chat continuation (trailing turn, text only)": {
        "messages": [QUESTION, ANSWER_START],
        **LIMITS,
        "model": "m",
    },
    "completion by example": {
        "messages": list(frame(CHAT).messages),
        **LIMITS,
        # What the reply repeats, a few more to recognise where it ends, and room for copied marks.
        "max_tokens": 30,
        **LOGPROBS,
        "model": "m",
    },
}
PATHS = {
    "llama-server completion": "/completion",
    "SGLang generate": "/generate",
    "TGI generate": "/generate",
    "Ollama generate": "/api/generate",
}


@pytest.mark.parametrize("dialect", LADDER, ids=lambda dialect: dialect.name)
def test_a_request_has_these_keys_and_no_others(dialect: Dialect) -> None:
    request = dialect.request(
        prompt_for(dialect), RequestOptions(max_tokens=2, top_logprobs=7, model="m")
    )
    assert request == REQUESTS[dialect.name]
    path = PATHS.get(dialect.name)
    openai = "/chat/completions" if dialect.form is PromptForm.CHAT else "/completions"
    assert (dialect.path, dialect.at_root) == (path or openai, path is not None)


@pytest.mark.parametrize("dialect", LADDER, ids=lambda dialect: dialect.name)
def test_without_a_model_none_is_named(dialect: Dialect) -> None:
    request = dialect.request(
        prompt_for(dialect), RequestOptions(max_tokens=2, top_logprobs=7, model=None)
    )
    expected = {k: v for k, v in REQUESTS[dialect.name].items() if k != "model"}
    assert request == expected


def test_an_empty_answer_has_no_assistant_turn() -> None:
    for dialect in LADDER:
        if dialect.form is PromptForm.CHAT:
            request = dialect.request(Prompt(messages=(QUESTION,)), RequestOptions(2, 7, "m"))
            assert request["messages"] == [QUESTION]
            assert not set(request) & set(FLAGS)


def test_dialects_have_unique_names_and_are_sorted_by_rung() -> None:
    names = [dialect.name for dialect in LADDER]
    assert len(set(names)) == len(names)
    rungs = [dialect.rung for dialect in LADDER]
    assert rungs == sorted(rungs)
    assert [get_dialect(name) for name in names] == list(LADDER)
    assert get_dialect("telepathy") is None
    ids = {dialect.name for dialect in LADDER if dialect.form is PromptForm.IDS}
    assert ids == {dialect.name for dialect in LADDER if dialect.rung == 1}


def test_only_vllm_has_a_variant_for_known_vocabularies() -> None:
    for dialect in LADDER:
        exact = prefer_ids(dialect)
        if dialect.name == "vLLM completions":
            request = exact.request(IDS, RequestOptions(2, 7, "m"))
            assert request == REQUESTS[dialect.name] | {"return_tokens_as_token_ids": True}
        else:
            assert exact is dialect
