"""Finding out how a server is asked: a way that lies is refused for its lie, and the next taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mlxroute.errors import LargeRefused, LargeTimeout, LargeUnreachable
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from mlxroute.large.negotiation.prober import NoUsableDialect, advise
from mlxroute.large.negotiation.verdict_file import RejectedDialect, Verdict
from tests.support import truthful
from tests.support.loopback import Loopback, Reply, Request
from tests.support.truthful import Ids, Json, Truthful
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
    return {refusal.dialect: refusal.reason for refusal in verdict.rejected}


def outcomes(verdict: Verdict) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verdict.checks}


@pytest.mark.parametrize(("family", "dialect"), FAMILIES.items())
def test_a_server_that_tells_the_truth_is_asked_in_its_own_dialect(
    family: str, dialect: str
) -> None:
    verdict = probe(Truthful(family))
    assert (verdict.dialect, verdict.model) == (dialect, "m")
    found = outcomes(verdict)
    logprobs = family not in ("text only", "mistral")
    assert found["logprobs"] is logprobs
    for name in ("mid-word", "trailing space", "multi-byte", "two in a row"):
        assert found[name] is True, name
    by_id = family in ("vllm", "llama-server", "sglang")
    assert verdict.token_source == ("the server's tokenise route" if by_id else None)
    assert found.get("ids round-trip") is (True if by_id else None)
    chat = "chat" in family or family == "mistral"
    assert found["end of answer"] is (True if by_id or chat else None)
    assert verdict.requests <= 24
    assert 0 <= verdict.latency_p50_s <= verdict.latency_p95_s


def test_what_a_server_tells_of_itself_is_in_the_verdict() -> None:
    answer = Truthful("llama-server")

    def knows_its_context(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": "m", "meta": {"n_ctx": 2048}}]})
        return answer(request)

    verdict = probe(knows_its_context)
    assert verdict.context_length == 2048
    assert outcomes(verdict)["prefix cache"] is True


# Lies, each with the dialect that has to be refused for it and the one that is left


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
    """The prompt as the text of a user's message, a new answer after it."""
    return TableTokenizer(truthful.VOCABULARY).render([{"role": "user", "content": text}])


def _trimmed(path: str, text: str) -> str:
    return text.rstrip(" ")


def _by_two(path: str, ids: Ids) -> Ids:
    """Right alone, wrong after another in the same call."""
    counting = ids[0] == truthful.VOCABULARY.id_of("Ġ12")
    return (ids[0], *[truthful.VOCABULARY.id_of("Sure")] * (len(ids) - 1)) if counting else ids


@pytest.mark.parametrize(
    ("family", "lies", "dialect", "reason"),
    [
        ("legacy", {"hears": _fresh}, "OpenAI completions", "a begun word is not continued"),
        ("legacy", {"shows": drops_logprobs}, "OpenAI completions", "logprobs: there are none"),
        (
            "legacy",
            {"shows": another_token},
            "OpenAI completions",
            "logprobs: the token written is not the most likely one",
        ),
        (
            "legacy",
            {"shows": too_probable},
            "OpenAI completions",
            "logprobs: the probabilities add up to more than 1",
        ),
        (
            "legacy",
            {"hears": _trimmed},
            "OpenAI completions",
            "trailing space: the space that ends a prompt is lost",
        ),
        (
            "legacy",
            {"says": _by_two},
            "OpenAI completions",
            "two in a row: ' 12,', in one call ' 12Sure'",
        ),
    ],
    ids=["starts anew", "no logprobs", "another token", "above 1", "trims", "two calls differ"],
)
def test_a_completions_route_that_lies_is_refused_and_the_chat_is_taken(
    family: str, lies: dict[str, Any], dialect: str, reason: str
) -> None:
    liar, honest = Truthful(family, **lies), Truthful("chat by flags")
    verdict = probe(lambda request: (honest if "chat" in request.path else liar)(request))
    assert reasons(verdict)[dialect].startswith(reason)
    assert verdict.dialect == "chat continuation (flags)"


def _closed(path: str, text: str) -> str:
    """A begun turn closed, and a new one begun."""
    begun = text.rpartition("<s>assistant\n")[2]
    return text + "<|im_end|>\n<s>assistant\n" if begun else text


def test_a_chat_that_closes_the_turn_is_refused_in_every_form() -> None:
    with pytest.raises(NoUsableDialect, match="starts a new answer") as caught:
        probe(Truthful("chat by flags", hears=_closed))
    assert "not continued (it wrote 'Sure')" in reasons(caught.value)["chat continuation (flags)"]


def test_a_server_that_reads_ids_as_text_is_asked_in_text() -> None:
    ids, text = Truthful("vllm"), Truthful("legacy")

    def answer(request: Request) -> Reply:
        if request.path != "/v1/completions":
            return ids(request)
        body = request.json
        if isinstance(body["prompt"], list):
            body["prompt"] = " ".join(map(str, body["prompt"]))
            return ids(Request("POST", request.path, {}, json.dumps(body).encode()))
        return text(request)

    verdict = probe(answer)
    assert "a begun word is not continued" in reasons(verdict)["vLLM completions"]
    assert verdict.dialect == "OpenAI completions"


def test_ids_that_are_not_those_of_the_text_are_refused() -> None:
    twelve, other = map(truthful.VOCABULARY.id_of, ("Ġ12", "Sure"))

    def other_ids(path: str, body: Json, reply: Json) -> Json:
        if path == "/v1/completions":
            choice = reply["choices"][0]
            choice["token_ids"] = [other if i == twelve else i for i in choice["token_ids"]]
        return reply

    liar = Truthful("vllm", shows=other_ids, hears=lambda path, text: text.replace("Sure", " 12"))
    honest = Truthful("legacy")

    def answer(request: Request) -> Reply:
        by_text = request.path == "/v1/completions" and isinstance(request.json["prompt"], str)
        return (honest if by_text else liar)(request)

    verdict = probe(answer)
    assert reasons(verdict)["vLLM completions"] == (
        f"ids round-trip: id {other} is not that of its text"
    )
    assert verdict.dialect == "OpenAI completions"


def test_characters_that_never_come_whole_are_refused() -> None:
    def in_shreds(path: str, body: Json, reply: Json) -> Json:
        names = reply["choices"][0]["logprobs"]["tokens"]
        reply["choices"][0]["text"] = "".join(names)
        return reply

    liar, honest = Truthful("legacy", shows=in_shreds), Truthful("chat by flags")
    verdict = probe(lambda request: (honest if "chat" in request.path else liar)(request))
    assert reasons(verdict)["OpenAI completions"] == (
        "multi-byte: a character of several tokens is never whole"
    )
    assert verdict.dialect == "chat continuation (flags)"


def test_an_answer_that_ends_too_late_is_refused() -> None:
    def leaks(path: str, body: Json, reply: Json) -> Json:
        """The end token is text like any other, and `stop` is said only later."""
        choice = reply["choices"][0]
        if choice["text"].startswith("Red") or not choice["text"]:
            count = body["max_tokens"]
            begun = ["Red"] if choice["text"] else []
            spoken = [*begun, "<|im_end|>", "\n", "\n"][:count]
            choice["text"] = "".join(spoken)
            choice["finish_reason"] = "stop" if count > len(spoken) else "length"
            choice["logprobs"] = {
                "tokens": spoken,
                "token_logprobs": [-0.1] * len(spoken),
                "top_logprobs": [{name: -0.1} for name in spoken],
            }
        return reply

    liar, honest = Truthful("legacy", shows=leaks), Truthful("chat by flags")
    files = TableTokenizer(truthful.VOCABULARY)
    verdict = probe(
        lambda request: (honest if "chat" in request.path else liar)(request),
        find_tokenizer=lambda name: files,
    )
    assert reasons(verdict)["OpenAI completions"].startswith("end of answer: it wrote")
    assert verdict.dialect == "chat continuation (flags)"


# The server's own trouble is no refusal


@pytest.mark.parametrize("status", [401, 402, 403, 408, 429, 502, 503, 504])
def test_a_server_in_trouble_is_not_refused_for_it(status: int) -> None:
    honest = Truthful("legacy")

    def answer(request: Request) -> Reply:
        if request.path != "/v1/completions":
            return honest(request)
        return Reply.of({"error": "not now"}, status=status)

    with pytest.raises(LargeRefused, match="not now") as caught:
        probe(answer)
    assert caught.value.status == status


def test_a_server_too_busy_to_tokenise_is_not_settled_for_less() -> None:
    honest = Truthful("vllm")

    def answer(request: Request) -> Reply:
        if request.path == "/tokenize":
            return Reply.of({"error": "not now"}, status=503)
        return honest(request)

    with pytest.raises(LargeRefused, match="not now"):
        probe(answer)


def test_a_body_that_breaks_a_server_is_a_refusal() -> None:
    honest = Truthful("legacy")

    def answer(request: Request) -> Reply:
        reply = honest(request)
        return Reply.of({"error": "oops"}, status=500) if reply.status != 200 else reply

    verdict = probe(answer)
    assert verdict.dialect == "OpenAI completions"
    assert reasons(verdict)["mlx_lm completions"] == "answered 500: oops"


def test_a_server_that_falls_silent_or_goes_away_is_not_refused_for_it() -> None:
    honest = Truthful("legacy")
    silent = Reply(stall_s=30)
    with pytest.raises(LargeTimeout):
        probe(lambda r: silent if "completions" in r.path else honest(r), timeout_s=0.3)
    cut = Reply(b"{}", cut_at=0)
    with pytest.raises(LargeUnreachable):
        probe(lambda r: cut if "completions" in r.path else honest(r))


# What to do when nothing fits


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["answered 404: Not Found", "the server has no tokenise route"], "end in the API's path"),
        (["answered 404: Not Found", "logprobs: there are none"], "gives no logprobs"),
        (["answered 404: x", "a begun word is not continued (it wrote 'I')"], "a new answer"),
        (["a begun word is not continued (it wrote 'x')", "logprobs: none"], "a new answer"),
        (["answered 404: x", "answered 400: bad model"], r"\(answered 400: bad model\)"),
    ],
)
def test_the_advice_fits_the_reasons(given: list[str], said: str) -> None:
    refusals = [RejectedDialect(str(number), reason) for number, reason in enumerate(given)]
    with pytest.raises(NoUsableDialect, match=said):
        raise NoUsableDialect(refusals)
    assert "\n" not in advise(refusals)


def test_an_address_without_the_apis_path_is_told_so() -> None:
    with pytest.raises(NoUsableDialect, match="does it end in the API's path, as in /v1"):
        probe(Truthful("nothing"))


def test_a_slow_server_is_settled_within_the_calls_own_time() -> None:
    """Without an earlier probe one call bounds all the questions together."""
    honest = Truthful("legacy")

    def slow(request: Request) -> Reply:
        reply = honest(request)
        return Reply(reply.body, status=reply.status, stall_s=0.1)

    with Loopback(slow) as server, LargeModel(server.url) as large:
        wanted = context("1, 2, 3,", truthful.VOCABULARY)
        with pytest.raises(LargeTimeout):
            large.next_token(wanted, deadline_s=0.35)
        assert len(server.requests) <= 5
        assert large.next_token(wanted, deadline_s=25).text == " "
