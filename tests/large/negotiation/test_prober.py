"""Probing: a dialect that the server answers wrongly is rejected, and the next one is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxroute.errors import LargeRefused, LargeTimeout, LargeUnreachable
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from mlxroute.large.negotiation.prober import NoUsableDialect
from mlxroute.large.negotiation.rejection import Rejection, RejectionKind, advise
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.types import Message, Span
from tests.support.example_chat import read_question, shows_examples
from tests.support.family_servers import VOCABULARY, FamilyServer, Ids, Json
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import TableTokenizer, context

FAMILIES = {
    "mlx_lm": "mlx_lm completions",
    "vllm": "vLLM completions",
    "llama-server": "llama-server completion",
    "sglang": "SGLang generate",
    "tgi": "TGI generate",
    "ollama": "Ollama generate",
    "legacy": "OpenAI completions",
    "text only": "OpenAI completions, text only",
    "chat by flags": "chat continuation (flags)",
    "chat by prefix": "chat continuation (prefix)",
    "chat by trailing turn": "chat continuation (trailing turn)",
    "echoing chat": "chat continuation (trailing turn, echoing)",
    "mistral": "chat continuation (prefix, echoing, text only)",
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)


def probe(answer: Callable[[Request], Reply], **options: Any) -> Verdict:
    with Loopback(answer) as server, LargeModel(server.url, **options) as large:
        return large.probe()


def reasons(verdict: Verdict | NoUsableDialect) -> dict[str, str]:
    return {item.dialect: item.reason for item in verdict.rejected}


def outcomes(verdict: Verdict) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verdict.checks}


@pytest.mark.parametrize(("family", "dialect"), FAMILIES.items())
def test_a_server_that_answers_correctly_gets_its_own_dialect(family: str, dialect: str) -> None:
    verdict = probe(FamilyServer(family))
    assert (verdict.dialect, verdict.model) == (dialect, "m")
    passed = outcomes(verdict)
    logprobs = family not in ("text only", "mistral")
    assert passed["logprobs"] is logprobs
    assert passed.get("leading space") is (None if logprobs else True)
    for name in ("mid-word", "trailing space", "multi-byte", "two in a row"):
        assert passed[name] is True, name
    by_id = family in ("vllm", "llama-server", "sglang")
    assert verdict.token_source == ("the server's tokenise route" if by_id else None)
    assert passed.get("ids round-trip") is (True if by_id else None)
    chat = "chat" in family or family == "mistral"
    assert passed["end of answer"] is (True if by_id or chat else None)
    assert verdict.requests <= 25
    assert 0 <= verdict.latency_p50_s <= verdict.latency_p95_s


def test_a_llama_server_with_several_models_gets_the_name_on_every_native_route() -> None:
    """In router mode it refuses a request without the name of a model."""
    server = FamilyServer("llama-server", models=("m", "other"))
    verdict = probe(server, model="m")
    assert (verdict.dialect, verdict.rung) == ("llama-server completion", 1)
    assert verdict.token_source == "the server's tokenise route"


@pytest.mark.parametrize(
    ("given", "served", "listed"),
    [
        ("nosuch", ("m", "other"), "m, other"),
        ("other", ("m", "other"), None),
        ("m", ("m:latest",), None),
        ("m", ("models/m", "models/other"), None),
        (None, ("m",), None),
        ("m", (), None),
    ],
)
def test_a_name_that_the_server_does_not_list_is_known_from_its_list(
    given: str | None, served: tuple[str, ...], listed: str | None
) -> None:
    """llama-server answers whatever model is named."""
    server = FamilyServer("llama-server", models=(given or "m",))

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": name} for name in served]})
        return server(request)

    with Loopback(answer) as loopback, LargeModel(loopback.url, model=given) as large:
        large.connect()
        assert large.listed_instead == listed


@pytest.mark.parametrize("is_array", [False, True], ids=["data", "Together's array"])
def test_the_context_length_that_a_server_reports_is_in_the_verdict(is_array: bool) -> None:
    answer = FamilyServer("llama-server")

    def with_context_length(request: Request) -> Reply:
        if request.path == "/v1/models":
            models = [{"id": "m", "meta": {"n_ctx": 2048}}]
            return Reply.of(models if is_array else {"data": models})
        return answer(request)

    verdict = probe(with_context_length)
    assert verdict.context_length == 2048
    assert outcomes(verdict)["prefix cache"] is True


def test_a_server_that_only_chats_is_asked_by_example() -> None:
    verdict = probe(FamilyServer("chat by example"))
    assert (verdict.dialect, verdict.rung) == ("completion by example", 5)
    assert verdict.is_approximate
    score, *checks = verdict.checks
    assert (score.name, score.passed) == ("score", True)
    assert score.detail == "12 of 12 partial answers were continued correctly"
    assert all(check.passed for check in checks if check.name != "prefix cache")
    assert "chat continuation (trailing turn)" in reasons(verdict)
    assert verdict.requests <= 60


def test_by_example_a_call_returns_one_token_whatever_is_prefetched() -> None:
    ask: Message = {"role": "user", "content": "Count."}
    answer = "1, 2, 3,"
    position = context(answer, VOCABULARY, messages=(ask,), spans=(Span(answer),))
    with Loopback(FamilyServer("chat by example")) as server, LargeModel(server.url) as large:
        large.connect()
        call = large.begin(position, prefetch=4)
        large.wait(lambda: call.finished, timeout_s=30)
        (token,) = call.result()
    assert token.text
    assert " 4".startswith(token.text)


def test_a_server_that_refuses_system_messages_gets_none_by_example() -> None:
    server = FamilyServer("chat by example")
    asked_by_example = 0

    def answer(request: Request) -> Reply:
        nonlocal asked_by_example
        messages = (request.json or {}).get("messages", [])
        if any(message["role"] == "system" for message in messages):
            return Reply.of({"error": {"message": "System role not supported"}}, status=400)
        if messages and shows_examples(messages):
            asked_by_example += 1
        elif messages and read_question(messages) is not None:
            message = {"role": "assistant", "content": "Sure, here is the rest."}
            return Reply.of({"choices": [{"message": message, "finish_reason": "length"}]})
        return server(request)

    assert probe(answer).is_approximate
    assert asked_by_example >= 12


def _chatty(path: str, body: Json, reply: Json) -> Json:
    message = reply["choices"][0]["message"]
    message["content"] = f"Sure, here is the rest: {message['content']}"
    return reply


def _repeating(path: str, body: Json, reply: Json) -> Json:
    """Repeat the part that was asked for twice."""
    if question := read_question(body["messages"]):
        reply["choices"][0]["message"]["content"] = question[2] * 2
    return reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_chatty, "only 0 of 12 partial answers were continued correctly (inside a word: it did"),
        (
            _repeating,
            "only 0 of 12 partial answers were continued correctly (inside a word: 'igh scat'",
        ),
    ],
)
def test_a_model_that_does_not_go_on_by_example_is_refused(change: Any, reason: str) -> None:
    with pytest.raises(NoUsableDialect) as caught:
        probe(FamilyServer("chat by example", change_reply=change))
    assert reasons(caught.value)["completion by example"].startswith(reason)
    assert "only chats" in str(caught.value)


def test_a_remembered_verdict_by_example_is_checked_with_one_question(tmp_path: Path) -> None:
    answer = FamilyServer("chat by example")
    with Loopback(answer) as server:
        with LargeModel(server.url, verdicts=tmp_path / "verdicts.json") as large:
            large.probe()
        count = len(server.requests)
        with LargeModel(server.url, verdicts=tmp_path / "verdicts.json") as again:
            assert "(completion by example)" in again.connect()
            assert again.is_approximate
        assert len(server.requests) - count <= 4


# Faults, each with the dialect that has to be rejected for it


def drops_logprobs(path: str, body: Json, reply: Json) -> Json:
    reply["choices"][0]["logprobs"] = None
    return reply


def another_token(path: str, body: Json, reply: Json) -> Json:
    logprobs = reply["choices"][0]["logprobs"]
    logprobs["token_logprobs"] = [-3.0 for _ in logprobs["tokens"]]
    return reply


def too_probable(path: str, body: Json, reply: Json) -> Json:
    tops = reply["choices"][0]["logprobs"]["top_logprobs"]
    for top in tops:
        top.update(dict.fromkeys(top, -0.1))
    return reply


def _fresh(path: str, text: str) -> str:
    """Return the prompt as a user's message, with a new answer after it."""
    return TableTokenizer(VOCABULARY).render([{"role": "user", "content": text}])


def _trimmed(path: str, text: str) -> str:
    return text.rstrip(" ")


def _by_two(path: str, ids: Ids) -> Ids:
    """Return a wrong second token after a right first one in the same call."""
    counting = ids[0] == VOCABULARY.id_of("Ġ12")
    return (ids[0], *[VOCABULARY.id_of("Sure")] * (len(ids) - 1)) if counting else ids


@pytest.mark.parametrize(
    ("family", "faults", "dialect", "reason"),
    [
        (
            "legacy",
            {"change_prompt": _fresh},
            "OpenAI completions",
            "an unfinished word is not continued",
        ),
        (
            "legacy",
            {"change_reply": drops_logprobs},
            "OpenAI completions",
            "logprobs: there are none",
        ),
        (
            "legacy",
            {"change_reply": another_token},
            "OpenAI completions",
            "logprobs: the token written is not the most likely one",
        ),
        (
            "legacy",
            {"change_reply": too_probable},
            "OpenAI completions",
            "logprobs: the probabilities add up to more than 1",
        ),
        (
            "legacy",
            {"change_prompt": _trimmed},
            "OpenAI completions",
            "trailing space: the space that ends a prompt is lost",
        ),
        (
            "legacy",
            {"change_tokens": _by_two},
            "OpenAI completions",
            "two in a row: ' 12,', in one call ' 12Sure'",
        ),
    ],
    ids=["starts anew", "no logprobs", "another token", "above 1", "trims", "two calls differ"],
)
def test_a_faulty_completions_route_is_rejected_and_the_chat_is_taken(
    family: str, faults: dict[str, Any], dialect: str, reason: str
) -> None:
    faulty, honest = FamilyServer(family, **faults), FamilyServer("chat by flags")
    verdict = probe(lambda request: (honest if "chat" in request.path else faulty)(request))
    assert reasons(verdict)[dialect].startswith(reason)
    assert verdict.dialect == "chat continuation (flags)"


def _stripped(path: str, body: Json, reply: Json) -> Json:
    """Return a reply without the white space that its text begins with."""
    choice = reply["choices"][0]
    if "message" in choice:
        choice["message"]["content"] = choice["message"]["content"].lstrip()
    else:
        choice["text"] = choice["text"].lstrip()
    choice["logprobs"] = None
    return reply


def _reads_unspaced(path: str, text: str) -> str:
    """Return the prompt with the spaces that a model does not miss."""
    return re.sub(r",(?=1\d)", ", ", text)


@pytest.mark.parametrize(
    ("family", "dialect"),
    [
        ("text only", "OpenAI completions, text only"),
        ("chat by trailing turn", "chat continuation (trailing turn, text only)"),
    ],
)
def test_a_server_of_text_alone_that_loses_the_space_of_a_word_is_rejected(
    family: str, dialect: str
) -> None:
    server = FamilyServer(family, change_prompt=_reads_unspaced, change_reply=_stripped)
    with pytest.raises(NoUsableDialect) as caught:
        probe(server)
    lost = "leading space: the space that begins a reply is lost"
    assert reasons(caught.value)[dialect] == lost


def _closed(path: str, text: str) -> str:
    """Return the prompt with its assistant turn closed and a new one begun."""
    answer = text.rpartition("<s>assistant\n")[2]
    return text + "<|im_end|>\n<s>assistant\n" if answer else text


def test_a_chat_that_closes_the_turn_is_rejected_in_every_form() -> None:
    with pytest.raises(NoUsableDialect, match="the server only chats") as caught:
        probe(FamilyServer("chat by flags", change_prompt=_closed))
    assert "not continued (it wrote 'Sure')" in reasons(caught.value)["chat continuation (flags)"]


def test_a_server_that_reads_ids_as_text_is_sent_text() -> None:
    ids, text = FamilyServer("vllm"), FamilyServer("legacy")

    def answer(request: Request) -> Reply:
        if request.path != "/v1/completions":
            return ids(request)
        body = request.json
        if isinstance(body["prompt"], list):
            body["prompt"] = " ".join(map(str, body["prompt"]))
            return ids(Request("POST", request.path, {}, json.dumps(body).encode()))
        return text(request)

    verdict = probe(answer)
    assert "an unfinished word is not continued" in reasons(verdict)["vLLM completions"]
    assert verdict.dialect == "OpenAI completions"


def test_ids_that_are_not_those_of_the_text_are_rejected() -> None:
    twelve, other = map(VOCABULARY.id_of, ("Ġ12", "Sure"))

    def other_ids(path: str, body: Json, reply: Json) -> Json:
        if path == "/v1/completions":
            choice = reply["choices"][0]
            choice["token_ids"] = [other if i == twelve else i for i in choice["token_ids"]]
        return reply

    faulty = FamilyServer(
        "vllm", change_reply=other_ids, change_prompt=lambda path, text: text.replace("Sure", " 12")
    )
    honest = FamilyServer("legacy")

    def answer(request: Request) -> Reply:
        by_text = request.path == "/v1/completions" and isinstance(request.json["prompt"], str)
        return (honest if by_text else faulty)(request)

    verdict = probe(answer)
    assert reasons(verdict)["vLLM completions"] == (
        f"ids round-trip: id {other} is not that of its text"
    )
    assert verdict.dialect == "OpenAI completions"


def test_characters_that_are_never_whole_are_rejected() -> None:
    def in_parts(path: str, body: Json, reply: Json) -> Json:
        names = reply["choices"][0]["logprobs"]["tokens"]
        reply["choices"][0]["text"] = "".join(names)
        return reply

    faulty, honest = FamilyServer("legacy", change_reply=in_parts), FamilyServer("chat by flags")
    verdict = probe(lambda request: (honest if "chat" in request.path else faulty)(request))
    assert reasons(verdict)["OpenAI completions"] == (
        "multi-byte: a character of several tokens is never whole"
    )
    assert verdict.dialect == "chat continuation (flags)"


def test_an_answer_that_ends_too_late_is_rejected() -> None:
    def leaks(path: str, body: Json, reply: Json) -> Json:
        """Write the end token as text, and report `stop` too late."""
        choice = reply["choices"][0]
        if choice["text"].startswith("Red") or not choice["text"]:
            count = body["max_tokens"]
            first = ["Red"] if choice["text"] else []
            texts = [*first, "<|im_end|>", "\n", "\n"][:count]
            choice["text"] = "".join(texts)
            choice["finish_reason"] = "stop" if count > len(texts) else "length"
            choice["logprobs"] = {
                "tokens": texts,
                "token_logprobs": [-0.1] * len(texts),
                "top_logprobs": [{name: -0.1} for name in texts],
            }
        return reply

    faulty, honest = FamilyServer("legacy", change_reply=leaks), FamilyServer("chat by flags")
    files = TableTokenizer(VOCABULARY)
    verdict = probe(
        lambda request: (honest if "chat" in request.path else faulty)(request),
        find_tokenizer=lambda name: files,
    )
    assert reasons(verdict)["OpenAI completions"].startswith("end of answer: it wrote")
    assert verdict.dialect == "chat continuation (flags)"


# Failures that no dialect caused reject none


@pytest.mark.parametrize("status", [401, 402, 403, 408, 429, 502, 503, 504, 520, 524, 529])
def test_a_status_that_no_dialect_caused_ends_the_probe(status: int) -> None:
    honest = FamilyServer("legacy")

    def answer(request: Request) -> Reply:
        if request.path != "/v1/completions":
            return honest(request)
        return Reply.of({"error": "not now"}, status=status)

    with pytest.raises(LargeRefused, match="not now") as caught:
        probe(answer)
    assert caught.value.status == status


@pytest.mark.parametrize("status", [503, 529])
def test_a_server_too_busy_to_tokenize_does_not_get_a_lesser_dialect(status: int) -> None:
    honest = FamilyServer("vllm")

    def answer(request: Request) -> Reply:
        if request.path == "/tokenize":
            return Reply.of({"error": "not now"}, status=status)
        return honest(request)

    with pytest.raises(LargeRefused, match="not now"):
        probe(answer)


def test_a_body_that_breaks_a_server_rejects_the_dialect() -> None:
    honest = FamilyServer("legacy")

    def answer(request: Request) -> Reply:
        reply = honest(request)
        return Reply.of({"error": "oops"}, status=500) if reply.status != 200 else reply

    verdict = probe(answer)
    assert verdict.dialect == "OpenAI completions"
    assert reasons(verdict)["mlx_lm completions"] == "answered 500: oops"


def test_a_server_that_stalls_or_disconnects_ends_the_probe() -> None:
    honest = FamilyServer("legacy")
    stalled = Reply(stall_s=30)
    with pytest.raises(LargeTimeout):
        probe(lambda r: stalled if "completions" in r.path else honest(r), timeout_s=0.3)
    cut = Reply(b"{}", cut_at=0)
    with pytest.raises(LargeUnreachable):
        probe(lambda r: cut if "completions" in r.path else honest(r))


# Advice when every dialect is rejected


@pytest.mark.parametrize(
    ("kinds", "advice"),
    [
        ([RejectionKind.NO_ROUTE, RejectionKind.NO_TOKENIZER], "end in the API's path"),
        ([RejectionKind.NO_ROUTE, RejectionKind.NO_LOGPROBS], "gives no logprobs"),
        ([RejectionKind.NO_ROUTE, RejectionKind.NOT_CONTINUED], "a new answer"),
        ([RejectionKind.NOT_CONTINUED, RejectionKind.NO_LOGPROBS], "a new answer"),
        ([RejectionKind.NOT_CONTINUED, RejectionKind.NOT_BY_EXAMPLE], "only chats"),
        ([RejectionKind.THINKS, RejectionKind.NOT_BY_EXAMPLE], "^reason 0; .* does not think"),
        ([RejectionKind.NO_ROUTE, RejectionKind.OTHER], r"\(reason 1\)"),
    ],
)
def test_the_advice_fits_the_kinds_of_rejection(kinds: list[RejectionKind], advice: str) -> None:
    rejections = [
        Rejection(f"dialect {number}", f"reason {number}", kind)
        for number, kind in enumerate(kinds)
    ]
    text = advise(rejections, ModelName(None))
    assert re.search(advice, text)
    assert "\n" not in text


@pytest.mark.parametrize(
    "words", ["the upstream answered 404", "answers were continued", "the word is not continued"]
)
def test_the_words_of_a_refusal_do_not_choose_the_advice(words: str) -> None:
    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": "m"}]})
        return Reply.of({"error": words}, status=400)

    with pytest.raises(NoUsableDialect) as caught:
        probe(answer)
    assert str(caught.value) == (
        f"this server works with none of the known dialects (answered 400: {words})"
    )


@pytest.mark.parametrize("model", ["m", "4", "ound"])
def test_an_address_without_the_apis_path_gets_that_advice(model: str) -> None:
    with pytest.raises(NoUsableDialect, match="does it end in the API's path, as in /v1"):
        probe(lambda request: Reply.of({"detail": "Not Found"}, status=404), model=model)


@pytest.mark.parametrize("served", [("good",), ()])
def test_a_model_that_the_server_does_not_have_is_said_in_its_words(served: tuple[str]) -> None:
    server = FamilyServer("vllm", models=("good",))

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": name} for name in served]})
        reply = server(request)
        is_missing = b"no such model" in reply.body
        message = "The model `bad` does not exist."
        return Reply.of({"error": {"message": message}}, status=404) if is_missing else reply

    with pytest.raises(NoUsableDialect) as caught:
        probe(answer, model="bad")
    assert str(caught.value) == "the server answered 404: The model `bad` does not exist."


def test_an_address_that_lists_models_is_not_called_wrong() -> None:
    with pytest.raises(NoUsableDialect) as caught:
        probe(FamilyServer("nothing"))
    assert str(caught.value) == (
        "the server lists models, but no known route completes text (answered 404: Not Found)"
    )


def test_a_negotiation_ends_at_the_deadline_of_its_call() -> None:
    """All requests of a negotiation within a call share the deadline of the call."""
    honest = FamilyServer("legacy")

    def slow(request: Request) -> Reply:
        reply = honest(request)
        return Reply(reply.body, status=reply.status, stall_s=0.1)

    with Loopback(slow) as server, LargeModel(server.url) as large:
        position = context("1, 2, 3,", VOCABULARY)
        with pytest.raises(LargeTimeout):
            large.next_token(position, deadline_s=0.35)
        assert len(server.requests) <= 5
        assert large.next_token(position, deadline_s=25).text == " "
