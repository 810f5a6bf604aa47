"""Chat and text completions: whole replies, streams, logprobs and answer documents."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlxroute.answers.document_file import parse_document
from mlxroute.engine import generate
from mlxroute.routers import make_router
from mlxroute.serving.http.replies.token_logprobs import LogprobForms
from mlxroute.serving.prompts import encode_prompt
from mlxroute.small import SmallModel
from tests.support import scripted_answer
from tests.support.endpoint import chat, read_stream
from tests.support.vocabularies import TableVocabulary

_LISTS = ("tokens", "token_logprobs", "top_logprobs")


def alone(small: SmallModel, prompt: str, *, max_tokens: int = 12) -> str:
    router = make_router("entropy", threshold=math.inf)
    messages = [{"role": "user", "content": prompt}]
    own = small.with_own_cache()
    return "".join(
        t.text for t in generate(own, None, messages, router=router, max_tokens=max_tokens)
    )


def post(client: TestClient, body: dict[str, Any], path: str = "chat/completions") -> Any:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_chat_completion_is_the_answer_that_ask_gives(
    client: TestClient, small: SmallModel
) -> None:
    reply = post(client, chat())
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": alone(small, "the quick brown fox"),
        "refusal": None,
    }
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"
    assert choice["finish_reason"] in ("stop", "length")
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert reply["mlxroute"]["id"] == reply["id"]
    assert reply["mlxroute"]["large"] is None


def test_a_stream_has_the_chunks_that_clients_expect(client: TestClient) -> None:
    whole = post(client, chat())["choices"][0]
    body = chat(stream=True, stream_options={"include_usage": True})
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, last, done = read_stream(response.text)
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in [*chunks, last]} == {response.headers["x-mlxroute-id"]}
    for key in ("created", "model"):
        assert len({chunk[key] for chunk in [*chunks, last]}) == 1
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-1]]
    assert all(texts)
    assert "".join(texts) == whole["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0


def test_a_stream_without_usage_has_none(client: TestClient) -> None:
    events = read_stream(client.post("/v1/chat/completions", json=chat(stream=True)).text)
    assert all("usage" not in chunk for chunk in events[:-1])
    assert events[-2]["mlxroute"]["tokens"] > 0


def test_logprobs_carry_the_origin_of_each_token(client: TestClient) -> None:
    reply = post(client, chat(logprobs=True, top_logprobs=3))
    (choice,) = reply["choices"]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["text"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert entry["source"] == "small"
        assert entry["checked"] is True
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])
        assert entry["top_logprobs"][0]["token"] == entry["small"]["text"]


def test_streamed_logprobs_are_those_of_a_whole_reply(client: TestClient) -> None:
    whole = post(client, chat(logprobs=True, top_logprobs=2, exact=True))
    body = chat(logprobs=True, top_logprobs=2, stream=True, exact=True)
    events = read_stream(client.post("/v1/chat/completions", json=body).text)
    choices = [event["choices"][0] for event in events[:-1]]
    entries = [c["logprobs"]["content"] for c in choices if c["logprobs"] is not None]
    assert list(itertools.chain(*entries)) == whole["choices"][0]["logprobs"]["content"]


def test_logprobs_name_the_first_token_as_the_answer_shows_it() -> None:
    vocabulary = TableVocabulary(["ĠHello", "ĠHi", "Yes"])
    ids = tuple(map(vocabulary.id_of, ["ĠHello", "ĠHi", "Yes"]))
    view = replace(
        scripted_answer.token("").signals,
        token_id=ids[0],
        top_ids=ids,
        top_logprobs=(-0.1, -3.0, -4.0),
    )
    first = replace(scripted_answer.token("Hello"), token_id=ids[0], signals=view)
    forms = LogprobForms(vocabulary, 3, is_chat=True)
    (entry,) = forms.answer([first])["content"]
    names = [item["token"] for item in entry["top_logprobs"]]
    assert (entry["token"], names) == ("Hello", ["Hello", "Hi", "Yes"])
    assert bytes(entry["bytes"]) == b"Hello"
    assert [bytes(item["bytes"]).decode() for item in entry["top_logprobs"]] == names
    (entry,) = forms.answer([replace(first, text=" Hello")])["content"]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == " Hello"


def test_a_text_completion_continues_texts_and_ids(client: TestClient, small: SmallModel) -> None:
    text = "the quick brown"
    ids = list(small.vocabulary.encode(text))
    reply = post(client, {"prompt": [text, text], "logprobs": 2}, "completions")
    by_ids = post(client, {"prompt": [ids]}, "completions")
    first, second = reply["choices"]
    assert [first["index"], second["index"]] == [0, 1]
    assert first["text"] == by_ids["choices"][0]["text"]
    logprobs = first["logprobs"]
    lengths = {len(values) for values in logprobs.values()}
    assert len(lengths) == 1
    assert logprobs["text_offset"][0] == 0
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"])
    assert reply["object"] == by_ids["object"] == "text_completion"
    assert len(reply["mlxroute"]["answer_ids"]) == 2


def test_only_a_whole_prompt_has_control_tokens_of_the_client(
    client: TestClient, small: SmallModel
) -> None:
    """A program renders the text of a completion; the content of a message is a user's."""
    name = next(iter(sorted(small.vocabulary.control_names)))
    control_id = small.vocabulary.control_ids[name]
    meant = encode_prompt(small, f"the {name} fox").ids
    message = [{"role": "user", "content": f"the {name} fox"}]
    plain = [{"role": "user", "content": "the fox"}]
    assert meant.count(control_id) == 1
    for content in (message, plain):
        ids = encode_prompt(small, content).ids
        assert ids.count(control_id) == encode_prompt(small, plain).ids.count(control_id)
    by_text = post(client, {"prompt": f"the {name} fox"}, "completions")
    by_ids = post(client, {"prompt": list(meant)}, "completions")
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]


def test_a_begun_turn_is_continued(client: TestClient, small: SmallModel) -> None:
    begun = "the lazy"
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": begun}]
    flagged = post(client, chat(messages=messages, continue_final_message=True))
    messages[1]["prefix"] = True  # type: ignore[assignment]
    prefixed = post(client, chat(messages=messages))
    text = small.encode_conversation(messages[:1]).text + begun
    raw = post(client, {"prompt": text}, "completions")
    texts = [reply["choices"][0]["message"]["content"] for reply in (flagged, prefixed)]
    assert texts == [raw["choices"][0]["text"]] * 2


def test_the_document_of_an_answer_can_be_read_later(client: TestClient) -> None:
    for reply in (post(client, chat()), post(client, {"prompt": "the"}, "completions")):
        data = client.get(f"/v1/mlxroute/answers/{reply['id']}")
        document = parse_document(data.content)
        assert document.id == reply["id"]
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert document.summary.text == text
    assert client.get("/v1/mlxroute/answers/chatcmpl-0").status_code == 404
    assert client.get("/v1/mlxroute/answers/..%2f..%2fetc").status_code == 404


def test_unknown_fields_are_named(client: TestClient) -> None:
    reply = post(client, {**chat(store=True, metadata={}), "a\x1b[2Jb": 1})
    assert reply["mlxroute"]["ignored"] == ["a [2Jb", "metadata", "store"]


def test_a_stop_string_ends_the_answer(client: TestClient, small: SmallModel) -> None:
    text = alone(small, "the quick brown fox")
    stop = text[3:5]
    reply = post(client, chat(stop=stop))
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_longer_answer_says_that_it_was_cut(client: TestClient) -> None:
    (choice,) = post(client, chat(max_completion_tokens=2))["choices"]
    assert choice["finish_reason"] == "length"


def test_text_parts_and_the_developer_role(client: TestClient) -> None:
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": " fox"}]
    plain = [{"role": "system", "content": "def"}, {"role": "user", "content": "the quick fox"}]
    mixed = [{"role": "developer", "content": "def"}, {"role": "user", "content": parts}]
    answers = [post(client, chat(messages=messages, exact=True)) for messages in (plain, mixed)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_neutral_values_are_accepted(client: TestClient) -> None:
    fields: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "logprobs": False,
        "stop": None,
        "seed": -1,
        "top_k": 40,
        "min_p": 0.05,
        "typical_p": 0.5,
    }
    assert post(client, chat(**fields))["mlxroute"]["ignored"] == []


def test_events_tell_of_the_prompt(client: TestClient) -> None:
    body = chat(stream=True, events=True)
    events = read_stream(client.post("/v1/chat/completions", json=body).text)
    prompts = [e["mlxroute"]["prompt"] for e in events[:-1] if not e["choices"]]
    assert prompts[-1]["done"] == prompts[-1]["total"]


def test_models_are_listed(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [item["id"] for item in listed["data"]] == ["tiny", "tiny:small"]
    assert listed["data"][0]["context_length"] == 512
    assert client.get("/v1/models/tiny:small").json() == listed["data"][1]
    assert client.get("/v1/models/tiny:large").status_code == 404


def test_an_echo_gives_the_likelihood_of_a_prompt(client: TestClient, small: SmallModel) -> None:
    ids = list(small.vocabulary.encode("the quick brown fox jumps over the lazy dog"))
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1}
    (choice,) = post(client, body, "completions")["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    own = small.with_own_cache()
    expected = own.score_text(ids[:1], ids[1:]).logprobs
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    # The greedy token is among the alternatives, and the prompt's own token always is.
    for token, value, top in zip(*(logprobs[k][1:-1] for k in _LISTS), strict=True):
        assert top[token] == value
        assert max(top.values()) >= value
    assert "".join(logprobs["tokens"][: len(ids)]) == choice["text"][: logprobs["text_offset"][-1]]


def test_the_offsets_of_an_echo_count_the_characters_of_its_text(
    client: TestClient, small: SmallModel
) -> None:
    name = next(iter(sorted(small.vocabulary.control_names)))
    text = f"é \U0001f389 fox{name}e"
    body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1}
    (choice,) = post(client, body, "completions")["choices"]
    assert choice["text"].startswith(text)
    ids = encode_prompt(small, text).ids
    pieces = [small.vocabulary.token_bytes(i) or name.encode() for i in ids]
    ends = list(itertools.accumulate(pieces))
    # A token within a character begins where the character does.
    expected = [0, *(len(end.decode(errors="ignore")) for end in ends)]
    assert choice["logprobs"]["text_offset"] == expected
    assert len(set(expected)) < len(expected)


def test_a_begin_token_that_the_text_lacks_has_no_length(
    client: TestClient, small: SmallModel
) -> None:
    name = next(iter(sorted(small.vocabulary.control_names)))
    endpoint = client.app.state.endpoint  # type: ignore[attr-defined]
    scored = replace(endpoint.scheduler.score(f"{name}def"), text="def")
    logprobs = LogprobForms(small.vocabulary, 1, is_chat=False).prompt(scored)
    assert logprobs["text_offset"][:2] == [0, 0]


def test_an_echo_without_an_answer(client: TestClient) -> None:
    body = {"prompt": "the fox", "echo": True, "max_tokens": 0}
    reply = post(client, body, "completions")
    (choice,) = reply["choices"]
    assert choice["text"] == "the fox"
    usage = reply["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])
    assert reply["mlxroute"]["tokens"] == 0
