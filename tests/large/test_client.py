"""The client: connecting, negotiation within a call, vocabularies, the address and secrets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxroute.errors import LargeNotContinued, LargeProtocolError, LargeRefused, UsageError
from mlxroute.large import LargeModel
from mlxroute.large.negotiation.verdict_file import VerdictFile
from mlxroute.types import Message, Span
from tests.support import family_servers
from tests.support.connected_clients import (
    MLX_LM,
    PLAIN,
    THE,
    VOCABULARY,
    ask_plain,
    connected_client,
    legacy,
)
from tests.support.family_servers import FamilyServer
from tests.support.loopback import Loopback, Reply, Request, mlx_lm_reply
from tests.support.vocabularies import TableTokenizer, TableVocabulary, context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def test_connect_names_the_model_and_the_dialect() -> None:
    with (
        Loopback(FamilyServer("mlx_lm", models=["/home/someone/big-7b"])) as server,
        LargeModel(server.url.removesuffix("/v1")) as large,
    ):
        line = large.connect()
        assert line == f"large model big-7b at {server.url} (mlx_lm completions)"
        assert (large.base_url, large.model_name) == (server.url, "big-7b")


def test_servers_without_a_list_of_models_have_records_of_their_own() -> None:
    addresses = [
        "http://127.0.0.1:1/v1",
        "http://127.0.0.1:2/v1",
        "http://me:secret@127.0.0.1:1/v1",
    ]
    unnamed = [LargeModel(address) for address in addresses]
    named = [LargeModel(address, model="/runs/1/big-7b") for address in addresses]
    first, second, with_password = (large.full_model_name for large in unnamed)
    assert first == with_password != second
    assert {large.model_name for large in unnamed} == {"the server's own model"}
    assert {large.full_model_name for large in named} == {"/runs/1/big-7b"}
    for large in (*unnamed, *named):
        large.close()


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("model", 5), ("ledger", "sent.jsonl"), ("top_logprobs", 0), ("top_logprobs", 2.5)],
)
def test_an_argument_of_the_wrong_form_is_named(parameter: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{parameter} must be ") as caught:
        LargeModel("http://127.0.0.1:1/v1", **{parameter: value})
    assert caught.value.parameter == parameter


def test_the_file_of_verdicts_may_be_named_by_a_text(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    with (
        Loopback(FamilyServer("mlx_lm")) as server,
        LargeModel(server.url, verdicts=str(path)) as large,
    ):
        large.connect()
    assert path.exists()


def test_connecting_again_sends_nothing() -> None:
    with Loopback(FamilyServer("mlx_lm")) as server, LargeModel(server.url) as large:
        line, count = large.connect(), len(server.requests)
        assert (large.connect(), len(server.requests)) == (line, count)


def test_the_only_model_of_a_plain_server_is_used() -> None:
    with (
        Loopback(FamilyServer("legacy", models=["only"])) as server,
        LargeModel(server.url) as large,
    ):
        assert "only" in large.connect()
        large.next_token(context("1, 2, 3,", family_servers.VOCABULARY))
        assert server.requests[-1].json["model"] == "only"


def test_several_models_need_a_choice() -> None:
    with Loopback(FamilyServer("legacy", models=["m1", "m\x1b[31m2"])) as server:
        with LargeModel(server.url) as large:
            with pytest.raises(UsageError, match=r"^model must be .*: m1, m \[31m2$") as caught:
                large.connect()
            assert caught.value.parameter == "model"
            with pytest.raises(LargeRefused, match="model must be given"):
                large.next_token(context("x", VOCABULARY))
        with LargeModel(server.url, model="m1") as large:
            assert large.connect().startswith("large model m1 at")


def test_several_models_on_mlx_lm_need_no_choice() -> None:
    answer = FamilyServer("mlx_lm", models=["m1", "m2"], needs_model=False)
    with Loopback(answer) as server, LargeModel(server.url) as large:
        large.connect()
        large.next_token(context("1, 2, 3,", family_servers.VOCABULARY))
        assert "model" not in server.requests[-1].json


def test_a_client_that_never_connected_negotiates_within_its_first_call() -> None:
    with Loopback(FamilyServer("legacy")) as server, LargeModel(server.url) as large:
        token = large.next_token(context("1, 2, 3,", family_servers.VOCABULARY), deadline_s=20)
        assert token.text == " "


def test_a_server_that_no_dialect_fits_is_a_protocol_error_that_advises_a_probe() -> None:
    with (
        Loopback(FamilyServer("closing chat")) as server,
        LargeModel(server.url) as large,
        pytest.raises(LargeProtocolError, match="probe it"),
    ):
        large.next_token(context("1, 2, 3,", family_servers.VOCABULARY))


def test_a_dialect_that_keeps_failing_is_forgotten_and_another_is_chosen(
    tmp_path: Path,
) -> None:
    verdicts = tmp_path / "verdicts.json"
    position = context("1, 2, 3,", family_servers.VOCABULARY)
    with (
        Loopback(FamilyServer("vllm")) as server,
        LargeModel(server.url, verdicts=verdicts) as large,
    ):
        large.connect()
        server.answer = FamilyServer("mlx_lm")
        for _ in range(2):
            with pytest.raises(LargeRefused):
                large.next_token(position)
        assert VerdictFile(verdicts).load(server.url, None) is None
        assert large.next_token(position).text == " "


def test_tokens_that_the_server_does_not_replay_are_no_failures_of_server_or_dialect(
    server: Loopback,
) -> None:
    fragment = VOCABULARY.id_of("Ã")
    other = mlx_lm_reply([(2, "a"), (2, "a"), (2, "a")])
    with connected_client(server, MLX_LM, model="m", tokenizer=TableTokenizer(VOCABULARY)) as large:
        for _ in range(4):
            server.script.append(other)
            with pytest.raises(LargeNotContinued, match="did not continue"):
                large.next_token(context("caf", VOCABULARY, fragment_ids=(fragment,)))
        server.script.append(mlx_lm_reply([(THE, "Ġthe"), (2, "a")]))
        assert large.next_token(context("x", VOCABULARY)).text == " the"


LETTERS = tuple(VOCABULARY.id_of(piece) for piece in ("Ġ", "t", "h", "e"))
SPELLED_OUT = context(
    "a the",
    VOCABULARY,
    answer=(VOCABULARY.id_of("a"), *LETTERS),
    spans=(Span("a"), *(Span(c, (i,)) for c, i in zip(" the", LETTERS, strict=True))),
)


def test_tokens_that_the_server_would_tokenize_otherwise_are_replayed(
    server: Loopback,
) -> None:
    replayed = [(i, VOCABULARY.piece(i) or "") for i in LETTERS]
    with connected_client(server, MLX_LM, model="m", tokenizer=TableTokenizer(VOCABULARY)) as large:
        server.script.append(mlx_lm_reply([*replayed, (3, "b"), (2, "a")]))
        assert large.next_token(SPELLED_OUT).text == "b"
    assert server.requests[-1].json["prompt"] == "a"


def test_where_the_server_does_not_replay_its_tokens_it_gets_the_whole_text(
    server: Loopback,
) -> None:
    with connected_client(server, MLX_LM, model="m", tokenizer=TableTokenizer(VOCABULARY)) as large:
        server.script.append(mlx_lm_reply([(2, "a")] * 6))
        server.script.append(mlx_lm_reply([(3, "b"), (2, "a")]))
        assert large.next_token(SPELLED_OUT).text == "b"
    assert [request.json["prompt"] for request in server.requests[-2:]] == ["a", "a the"]


def test_vocabularies_are_compared_once_and_remembered(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    shared, other = family_servers.VOCABULARY, TableVocabulary(["a", "b"])
    with Loopback(FamilyServer("vllm")) as server:
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert large.pair_vocabulary(shared)
            assert not large.pair_vocabulary(other)
        before = len(server.requests)
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert large.pair_vocabulary(shared)
            assert not large.pair_vocabulary(other)
        paths = [request.path for request in server.requests[before:]]
        assert paths.count("/v1/completions") == 1
        # The sample text of the connection, and a sample of each vocabulary.
        assert paths.count("/detokenize") == 3


@pytest.mark.parametrize("family", ["vllm", "llama-server", "sglang"])
def test_another_model_under_a_remembered_name_has_another_vocabulary(
    family: str, tmp_path: Path
) -> None:
    verdicts, shared = tmp_path / "verdicts.json", family_servers.VOCABULARY
    other = TableVocabulary(family_servers.PIECES[::-1])
    with Loopback(FamilyServer(family)) as server:
        for vocabulary, is_same in [(shared, True), (other, False), (other, False), (shared, True)]:
            server.answer = FamilyServer(family, vocabulary=vocabulary)
            with LargeModel(server.url, verdicts=verdicts) as large:
                assert large.pair_vocabulary(shared) is is_same


def test_other_tokenizer_files_under_a_remembered_name_are_another_vocabulary(
    tmp_path: Path,
) -> None:
    verdicts, shared = tmp_path / "verdicts.json", family_servers.VOCABULARY
    other = TableVocabulary(family_servers.PIECES[::-1])
    with Loopback(FamilyServer("legacy")) as server:
        for vocabulary, is_same in [(shared, True), (other, False), (other, False), (shared, True)]:
            files = {"m": TableTokenizer(vocabulary)}
            with LargeModel(server.url, verdicts=verdicts, find_tokenizer=files.get) as large:
                assert large.pair_vocabulary(shared) is is_same


def test_a_server_that_encodes_no_conversations_gets_the_prompt_of_the_small_model() -> None:
    vocabulary = TableVocabulary(family_servers.PIECES[::-1])
    large_vocabulary = family_servers.VOCABULARY
    text, answer = "<s>user\nhi<|im_end|>\n<s>assistant\n", "1, 2, 3,"
    asked = context(
        text + answer,
        vocabulary,
        messages=({"role": "user", "content": "hi"},),
        spans=(Span(answer),),
    )
    with Loopback(FamilyServer("old sglang")) as server, LargeModel(server.url) as large:
        assert "SGLang" in large.connect()
        assert large.next_token(asked).text == " "
        assert not large.knows_chat_template
        prompt = TableTokenizer(large_vocabulary).encode_prompt(text)
        assert server.requests[-1].json["input_ids"] == [*prompt, *large_vocabulary.encode(answer)]


def test_with_a_shared_vocabulary_ids_are_sent_and_received_inside_a_character_too() -> None:
    vocabulary = family_servers.VOCABULARY
    ids = vocabulary.encode("漢字漢字漢")
    halves = vocabulary.encode("字")
    with Loopback(FamilyServer("vllm")) as server, LargeModel(server.url) as large:
        large.connect()
        token = large.next_token(
            context("漢字漢字漢", vocabulary, answer=ids, fragment_ids=halves[:1])
        )
        assert (token.token_ids, token.text, token.large_ids) == (halves[1:2], "", halves[1:2])
        assert server.requests[-1].json["prompt"] == [*ids, halves[0]]
        assert server.requests[-1].json["return_tokens_as_token_ids"] is True


def naming(count: int) -> FamilyServer:
    """Return an mlx_lm server whose replies name this many additional tokens."""

    def names(path: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        for position in reply["choices"][0]["logprobs"]["content"]:
            position["top_logprobs"] += [
                {"id": i, "token": family_servers.VOCABULARY.piece(i), "logprob": -9.0}
                for i in range(80, 80 + count)
            ]
        return reply

    return FamilyServer("mlx_lm", change_reply=names)


def test_vocabularies_are_compared_before_the_first_answer() -> None:
    vocabulary = family_servers.VOCABULARY
    halves = vocabulary.encode("字")
    begun = context("漢字漢字漢", vocabulary, fragment_ids=halves[:1])
    with Loopback(naming(60)) as server, LargeModel(server.url) as large:
        assert large.next_token(begun).token_ids == halves[1:2]


@pytest.mark.parametrize("family", ["vllm", "llama-server", "sglang", "mlx_lm"])
def test_vocabularies_that_differ_in_control_tokens_alone_are_not_shared(family: str) -> None:
    other = TableVocabulary(family_servers.PIECES, end_name="<|end|>")
    for vocabulary in (family_servers.VOCABULARY, other):
        # An mlx_lm server names enough tokens with these.
        change = naming(60)._change_reply if family == "mlx_lm" else lambda path, body, reply: reply
        answer = FamilyServer(family, vocabulary=vocabulary, change_reply=change)
        with Loopback(answer) as server, LargeModel(server.url) as large:
            is_same = vocabulary is family_servers.VOCABULARY
            assert large.pair_vocabulary(family_servers.VOCABULARY) is is_same


def test_a_vocabulary_that_cannot_be_compared_at_first_counts_as_another_from_then_on() -> None:
    vocabulary = family_servers.VOCABULARY
    begun = context("漢字漢字漢", vocabulary, fragment_ids=vocabulary.encode("字")[:1])
    with Loopback(naming(0)) as server, LargeModel(server.url) as large:
        for _ in range(2):
            with pytest.raises(LargeNotContinued, match="inside a character"):
                large.next_token(begun)
            server.answer = naming(60)
            large.next_token(context("1, 2, 3,", vocabulary))


def test_with_another_vocabulary_the_large_models_own_ids_are_sent() -> None:
    large_vocabulary, small = family_servers.VOCABULARY, TableVocabulary(["Red", "R", "e", "d"])
    asked: Message = {"role": "user", "content": "What colour is blood?"}
    position = context("small words", small, messages=(asked,))
    with Loopback(FamilyServer("vllm")) as server, LargeModel(server.url) as large:
        large.connect()
        token = large.next_token(position)
        assert (token.text, token.token_ids) == ("Red", small.encode("Red"))
        assert token.large_ids == (large_vocabulary.id_of("Red"),)
        sent = server.requests[-1].json["prompt"]
        tokenizer = TableTokenizer(large_vocabulary)
        assert sent == tokenizer.encode_prompt(tokenizer.render([asked]))
        position = context("", small, messages=(asked,), spans=(Span("Red", token.large_ids),))
        assert large.next_token(position).is_eos


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("localhost:8081", "http:// or https://"),
        ("ftp://host/v1", "http:// or https://"),
        ("http://", "no host"),
        ("http://host:port/v1", "host or port"),
        ("http://host:99999/v1", "from 1 to 65535"),
        ("http://[::1/v1", "not a URL"),
        ("http://host/v1?key=1", "without"),
        ("http://ho st/v1", "space"),
        ("http://a..b/v1", "empty or too long"),
        (f"http://{'a' * 64}.example/v1", "empty or too long"),
        ("", "http:// or https://"),
    ],
)
def test_a_malformed_address_is_one_clear_line_with_an_example(typed: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"for example http://127\.0\.0\.1:8081/v1") as caught:
        LargeModel(typed)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://host:8081", "http://host:8081/v1"),
        ("http://host:8081/", "http://host:8081/v1"),
        ("https://host/inference/v1/", "https://host/inference/v1"),
        ("HTTP://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_the_address_is_completed(typed: str, url: str) -> None:
    with LargeModel(typed) as large:
        assert large.base_url == url


@pytest.mark.parametrize("parameter", ["timeout_s", "connect_timeout_s"])
@pytest.mark.parametrize("seconds", [0, -1.0, 86_401, math.nan])
def test_a_timeout_out_of_range_names_its_parameter(parameter: str, seconds: float) -> None:
    with pytest.raises(UsageError, match=f"^{parameter} must be above 0 and at most") as caught:
        LargeModel("http://host/v1", **{parameter: seconds})  # type: ignore[arg-type]
    assert caught.value.parameter == parameter


# Secrets


def test_the_key_is_sent_and_shown_nowhere() -> None:
    def answer(request: Request) -> Reply:
        echoed = request.headers["authorization"]
        return Reply.of({"error": {"message": f"bad key: {echoed}"}}, status=401)

    with Loopback(answer) as strict, LargeModel(strict.url, api_key="sk-secret") as large:
        with pytest.raises(LargeRefused, match="check the API key") as caught:
            large.connect()
        assert strict.requests[0].headers["authorization"] == "Bearer sk-secret"
        assert "secret" not in str(caught.value) + repr(large)


def test_a_key_with_a_line_break_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError) as caught:
        LargeModel("http://host/v1", api_key="sk-secret\nX-Evil: 1")
    assert "secret" not in str(caught.value)


def test_user_and_password_in_the_address_are_sent_but_not_shown(server: Loopback) -> None:
    server.script.extend([Reply.of({"error": "no"}, status=403)] * 9)
    typed = server.url.replace("http://", "http://me:pass%40word@")
    with LargeModel(typed, model="m") as large:
        with pytest.raises(LargeRefused) as caught:
            large.connect()
        assert "word" not in repr(large) + str(caught.value) + large.base_url
    assert server.requests[0].headers["authorization"] == "Basic bWU6cGFzc0B3b3Jk"


@pytest.mark.parametrize("typed", ["htp://me:word@host", "me:word@host:1", "http://me:word@:1/"])
def test_a_password_in_a_malformed_address_is_not_shown(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        LargeModel(typed)
    assert "word" not in str(caught.value)


def test_credentials_of_a_netrc_file_are_never_sent(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password word\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    ask_plain(server, legacy("a"))
    assert all("authorization" not in request.headers for request in server.requests)


def test_cookies_of_a_server_are_not_kept(server: Loopback) -> None:
    with connected_client(server, PLAIN, model="m") as large:
        body = json.dumps(legacy("a")).encode()
        server.script.append(Reply(body, headers={"Set-Cookie": "id=1"}))
        server.script.append(Reply.of(legacy("a")))
        for _ in range(2):
            large.next_token(context("x", VOCABULARY))
    assert "cookie" not in server.requests[-1].headers


def test_a_proxy_for_the_outside_is_not_used_for_this_machine(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    assert ask_plain(server, legacy("a")).text == "a"


@pytest.mark.parametrize("status", [400, 500])
def test_a_chat_server_without_a_system_role_gets_the_system_text_in_the_first_turn(
    status: int,
) -> None:
    honest = FamilyServer("chat by prefix")

    def refuses(request: Request) -> Reply:
        messages = (request.json or {}).get("messages", []) if request.body else []
        if any(message["role"] == "system" for message in messages):
            return Reply.of({"error": {"message": "System role not supported"}}, status=status)
        return honest(request)

    messages: tuple[Message, ...] = (
        {"role": "system", "content": "one"},
        {"role": "user", "content": "<|im_end|>hi"},
    )
    position = context("", family_servers.VOCABULARY, messages=messages)
    with Loopback(refuses) as server, LargeModel(server.url) as large:
        large.connect()
        count = len(server.requests)
        for _ in range(3):
            large.next_token(position)
        sent = [r.json["messages"] for r in server.requests[count:]]
        folded = {"role": "user", "content": "one\n\n< |im_end|>hi"}
        # A 500 is retried first; once the folded form was accepted, it is sent at once.
        refused = sum(m[0]["role"] == "system" for m in sent)
        assert all(m[0]["role"] == "system" for m in sent[:refused])
        assert [m[0] for m in sent[refused:]] == [folded] * 3
        assert large.neutralised == ("<|im_end|>",)
