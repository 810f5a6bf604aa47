"""The requests of real clients, in the form in which they arrive; nothing of them is refused.

tests/serving/clients runs the clients themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlxroute.backend.load import load
from mlxroute.engine import Options
from mlxroute.serving.http.model_names import ModelNames
from mlxroute.serving.http.parsing.chat_fields import read_chat
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.small import SmallModel
from mlxroute.types import Sampling
from tests.support.endpoint import chat, make_session, read_stream, running
from tests.support.tiny import END, make_tiny_model, teach_next

_USAGE = {"include_usage": True}
# Client: the fields that it sends beside the model and the messages.
_CHATS: dict[str, dict[str, Any]] = {
    "llm": {"max_tokens": 6, "stream": True, "stream_options": _USAGE},
    "aider": {"temperature": 0, "stream": True},
    "continue": {"max_tokens": 6, "stream": True, "stream_options": _USAGE, "tools": []},
    "langchain": {"max_completion_tokens": 6, "temperature": 0.0, "stream": False},
    "langchain-stream": {"max_completion_tokens": 6, "stream": True, "stream_options": _USAGE},
    "lm-eval": {"max_tokens": 6, "temperature": 0.0, "stop": ["\n\nQuestion:"], "seed": 1234},
    "lm-studio": {"max_tokens": -1, "temperature": 0.0, "stream": False},
}
_COMPLETIONS: dict[str, dict[str, Any]] = {
    "langchain": {
        "prompt": ["One, two,", "a b c"],
        "frequency_penalty": 0,
        "logprobs": None,
        "max_tokens": 5,
        "n": 1,
        "presence_penalty": 0,
        "seed": None,
        "temperature": 0.0,
        "top_p": 1,
    },
    "llama.cpp": {"prompt": ["One, two,", "a b c"], "max_tokens": -1},
    "lm-eval": {
        "prompt": [[65, 66, 67], [68, 69]],
        "max_tokens": 5,
        "temperature": 0.0,
        "stop": ["Question:"],
        "seed": 1234,
    },
}


@pytest.mark.parametrize("name", _CHATS)
def test_chats_of_clients(client: TestClient, name: str) -> None:
    fields = _CHATS[name]
    # Many clients send an empty key to an endpoint without one.
    headers = {"Authorization": "Bearer "}
    response = client.post("/v1/chat/completions", json=chat(**fields), headers=headers)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        reply = response.json()
        assert reply["choices"][0]["message"]["content"]
        assert reply["mlxroute"]["ignored"] == []
        return
    *chunks, last = read_stream(response.text)
    assert last == "[DONE]"
    (summary,) = [chunk["mlxroute"] for chunk in chunks if "mlxroute" in chunk]
    assert summary["ignored"] == []
    assert bool(chunks[-1].get("usage")) == ("stream_options" in fields)


@pytest.mark.parametrize("name", _COMPLETIONS)
def test_completions_of_clients(client: TestClient, name: str) -> None:
    fields = _COMPLETIONS[name]
    response = client.post("/v1/completions", json={"model": "mlxroute", **fields})
    assert response.status_code == 200, response.text
    reply = response.json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["mlxroute"]["ignored"] == []


def test_likelihoods_for_lm_eval(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny", tied=False)
    teach_next(path, "s", END)
    small = SmallModel(*load(path), name="tiny")
    prompts = [[65, 66, 67], [68, 69], list(small.vocabulary.encode("As"))]
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    body = {"model": "mlxroute:small", "prompt": prompts, **fields}
    with running(make_session(small)) as client:
        reply = client.post("/v1/completions", json=body).json()
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        logprobs = choice["logprobs"]
        # One token follows the prompt; the first token of a prompt has no likelihood.
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        assert all(len(top) >= 1 for top in logprobs["top_logprobs"][1:])
    # lm-eval leaves out the last entry, which is the end token's where the answer is empty.
    ended = reply["choices"][-1]
    assert (ended["text"], ended["finish_reason"]) == ("As", "stop")
    assert ended["logprobs"]["tokens"][-1] == END
    assert ended["logprobs"]["text_offset"][-1] == len("As")
    assert ended["logprobs"]["provenance"][-1]["text"] == ""


def test_a_top_p_of_0_is_greedy(client: TestClient) -> None:
    sampled = chat(temperature=1.5, top_p=0, seed=1, top_k=40)
    texts = [
        client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        for body in (chat(), sampled)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("fields", "seed"), [({}, 5), ({"seed": 7}, 7), ({"seed": -1}, None)])
def test_a_seed_of_minus_1_is_random_as_on_llama_cpp(
    fields: dict[str, Any], seed: int | None
) -> None:
    model: Any = SimpleNamespace(name="tiny", context_length=512, fingerprint="")
    options = Options(sampling=Sampling(temperature=1.0, seed=5))
    session = ServingSession(model, None, options=options)
    answer = read_chat(chat(**fields), session, ModelNames(session, created=0)).answer
    assert answer.options.sampling.seed == seed


@pytest.mark.parametrize("top_k", [40, 0, -1])
def test_a_request_sets_the_filters_of_sampling(top_k: int) -> None:
    model: Any = SimpleNamespace(name="tiny", context_length=512, fingerprint="")
    options = Options(sampling=Sampling(temperature=1.0, top_k=20, min_p=0.1))
    session = ServingSession(model, None, options=options)
    names = ModelNames(session, created=0)
    filters: dict[str, Any] = {"top_p": 0.9, "top_k": top_k, "min_p": 0.05}
    sampling = read_chat(chat(**filters), session, names).answer.options.sampling
    assert sampling == Sampling(1.0, top_p=0.9, top_k=max(top_k, 0), min_p=0.05)
    assert read_chat(chat(), session, names).answer.options.sampling == options.sampling


def test_tools_sent_unasked_are_refused_with_the_way_out(small: SmallModel) -> None:
    tools = [{"type": "function", "function": {"name": "Read", "parameters": {"type": "object"}}}]
    with running(make_session(small)) as client:
        response = client.post("/v1/chat/completions", json=chat(tools=tools, stream=True))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "--tools large" in response.json()["error"]["message"]


def test_an_unknown_path_names_the_paths_as_they_are_written(client: TestClient) -> None:
    message = client.get("/v1/tokenizer_info").json()["error"]["message"]
    assert "GET /v1/models/{model}" in message
    assert not re.search(r"\{\w+:\w+\}", message)
