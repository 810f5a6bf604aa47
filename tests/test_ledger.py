"""The ledger: every request body that is sent, without secrets, and the totals."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.answers.document_file import format_document, parse_document
from mlxroute.errors import LargeError, LargeUnrecorded, UsageError
from mlxroute.large import LargeModel
from mlxroute.ledger import Ledger, Secrets
from mlxroute.types import Prices, Uploads
from mlxroute.view.answer_html import draw_page
from mlxroute.view.answer_text import answer_rows
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.documents import make_document
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import honest, negotiated
from tests.support.vocabularies import context

URL = "http://127.0.0.1:1/v1/completions"
DOCUMENT = make_document()
KEY = 'sk-"quoted\\key'


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback(honest(lambda request: Reply.of(legacy(" the")))) as running:
        yield running


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def test_a_line_has_time_address_size_and_body(tmp_path: Path) -> None:
    noon = datetime(2026, 1, 2, 12, 0, 0, 250_000, tzinfo=UTC)
    with Ledger(tmp_path / "sent", now=lambda: noon) as ledger:
        ledger.record_request(URL, b'{"prompt": "caf\xc3\xa9"}')
        ledger.record_request(URL, b"no json \xff")
    assert lines(tmp_path / "sent") == [
        {
            "time": "2026-01-02T12:00:00.250Z",
            "url": URL,
            "bytes": 19,
            "body": {"prompt": "café"},
        },
        {"time": "2026-01-02T12:00:00.250Z", "url": URL, "bytes": 9, "body": "no json \ufffd"},
    ]


def test_the_file_holds_exactly_what_the_server_received(server: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "sent"
    address = server.url.replace("//", "//user:pass@")
    with Ledger(path) as ledger, negotiated(LargeModel(address, model="m", ledger=ledger)) as large:
        for text in ("a", 'é\n"\u2028 漢字 \x7f'):
            large.next_token(context(text, VOCABULARY))
        uploads = large.uploads
    received = [request.body for request in server.requests if request.body]
    written = lines(path)
    assert [json.dumps(w["body"], ensure_ascii=False).encode() for w in written] == received
    assert [w["bytes"] for w in written] == [len(body) for body in received]
    assert {w["url"] for w in written} == {f"{server.url}/completions"}
    assert "pass" not in path.read_text(encoding="utf-8")
    assert (uploads.requests, uploads.size_bytes) == (2, sum(map(len, received)))


def test_an_entry_is_one_line_also_where_a_text_is_split(tmp_path: Path) -> None:
    body = {"prompt": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"}
    with Ledger(tmp_path / "sent") as ledger:
        ledger.record_request(URL, json.dumps(body).encode())
    (line,) = (tmp_path / "sent").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["body"] == body


def test_the_requests_of_a_probe_are_recorded_too(server: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "sent"
    with Ledger(path) as ledger, LargeModel(server.url, model="m", ledger=ledger) as large:
        large.connect()
        large.next_token(context("a", VOCABULARY))
        uploads = large.uploads
    received = [request for request in server.requests if request.body]
    assert [entry["body"] for entry in lines(path)] == [request.json for request in received]
    root = server.url.removesuffix("/v1")
    assert [entry["url"] for entry in lines(path)] == [root + request.path for request in received]
    assert {"/tokenize", "/generate", "/v1/completions"} <= {request.path for request in received}
    assert uploads.requests == len(received) > 10
    assert uploads.size_bytes == sum(len(request.body) for request in received)


def test_a_new_file_is_private_and_an_existing_one_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    for _ in range(2):
        with Ledger(path) as ledger:
            ledger.record_request(URL, b"{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(lines(path)) == 2


def test_each_line_is_written_at_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "sent") as ledger:
        ledger.record_request(URL, b"{}")
        assert len(lines(tmp_path / "sent")) == 1


@given(st.lists(st.text(max_size=5), max_size=4), st.booleans())
def test_a_secret_is_redacted_in_any_encoding(
    tmp_path_factory: Any, around: list[str], ensure_ascii: bool
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "sent"
    text = KEY.join(["", *around, ""])
    body: dict[str, object] = {"prompt": text, "y": [{"x": text}], "ids": [1, None, True, 0.5]}
    with Ledger(path) as ledger:
        ledger.secrets.add(KEY[:8], KEY)
        ledger.record_request(
            URL, json.dumps(body, ensure_ascii=ensure_ascii).encode(errors="replace")
        )
        ledger.record_request(URL, text.encode(errors="replace"))
    for written in lines(path):
        assert KEY[:8] not in json.dumps(written, ensure_ascii=False)
        assert "[key]" in str(written["body"])


def test_keys_of_objects_stay_as_they_are() -> None:
    secrets = Secrets()
    secrets.add("large_model")
    assert secrets.redact_json({"large_model": ["a large_model"]}) == {"large_model": ["a [key]"]}


@given(st.text(min_size=1, max_size=7) | st.sampled_from(["na", "1", "x", "token", "text"]))
def test_a_short_key_leaves_a_saved_answer_as_it_is(key: str) -> None:
    secrets = Secrets()
    secrets.add(key)
    assert parse_document(format_document(DOCUMENT, redact=secrets.redact_json)) == DOCUMENT


def test_a_short_password_is_kept_out_of_messages_and_changes_no_conversation() -> None:
    secrets = Secrets()
    secrets.add("cat", "cat-and-dog")
    assert secrets.redact("401: cat, cat-and-dog") == "401: [key], [key]"
    assert secrets.redact_json(["a cat", "cat-and-dog"]) == ["a cat", "[key]"]
    assert not secrets.appear_in("a cat-and-dog")


def test_a_key_that_is_cut_off_or_spread_over_texts_is_redacted() -> None:
    secrets = Secrets()
    secrets.add("sk-proj-abcdefghijk", "proj-abcdefgh", "password1")
    body = {"prompt": "Bearer sk-proj-abc", "texts": ["ends in sk-proj-ab", "more"]}
    redacted = {"prompt": "Bearer [key]", "texts": ["ends in [key]", "more"]}
    assert secrets.redact_json(body, may_be_cut=True) == redacted
    # Short ones may be the beginning of a word.
    assert secrets.redact_json("a password", may_be_cut=True) == "a password"
    pieces = ["a sk-", "proj-abcde", "fghijk, a pass", "word1"]
    assert secrets.redact_json(pieces) == ["a [key]", "", ", a [key]", ""]


def test_words_with_which_a_key_begins_stay(tmp_path: Path) -> None:
    with Ledger(tmp_path / "sent") as ledger:
        ledger.secrets.add("password-for-my-box")
        prompts = ["its name is password", "its value is password-for-my-b"]
        for prompt in prompts:
            ledger.record_request(URL, json.dumps({"prompt": prompt}).encode())
        redact = ledger.secrets.redact_json
    sent = [line["body"]["prompt"] for line in lines(tmp_path / "sent")]
    assert sent == ["its name is password", "its value is [key]"]
    assert redact([" password", "password-for-my-b"]) == [" password", "password-for-my-b"]
    document = make_document(
        b"it is password-for-my", messages=[{"role": "user", "content": "password"}]
    )
    assert parse_document(format_document(document, redact=redact)) == document


def test_tokens_that_spell_the_key_are_not_saved() -> None:
    secrets = Secrets()
    secrets.add("sk-abcdef123456")
    asked = make_document(b'is "sk-abcdef123456" it?', [b"a", b"?"], unsure=(7, 23))
    data = format_document(asked, redact=secrets.redact_json)
    document = parse_document(data)
    assert "".join(token.text for token in document.tokens) == 'is "[key]" it?'
    assert document.summary.text == 'is "[key]" it?'
    spelled = [token for token in document.tokens if token.id < 0]
    assert [token.index for token in spelled] == list(range(4, 19))
    assert {(token.small, token.large) for token in spelled} == {(None, None)}
    assert document.replies == ()
    assert asked.replies
    # It can be shown all the same.
    assert answer_rows(document, width=None)
    assert "[key]" in draw_page(document)


def test_the_large_model_adds_its_secrets_to_the_ledger(server: Loopback, tmp_path: Path) -> None:
    address = server.url.replace("//", "//user:pass-word@")
    with (
        Ledger(tmp_path / "sent") as ledger,
        negotiated(LargeModel(address, model="m", api_key="sk-secret", ledger=ledger)) as large,
    ):
        large.next_token(context("my key is sk-secret, pass-word", VOCABULARY))
    assert lines(tmp_path / "sent")[-1]["body"]["prompt"] == "my key is [key], [key]"
    assert server.prompts[-1] == "my key is sk-secret, pass-word"


@pytest.mark.parametrize("name", ["missing/sent", "folder", "nul\0name"])
def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written") as caught:
        Ledger(tmp_path / name)
    assert caught.value.parameter == "ledger"


def test_a_body_that_cannot_be_recorded_is_not_sent(server: Loopback, tmp_path: Path) -> None:
    with (
        Ledger(tmp_path / "sent") as ledger,
        negotiated(LargeModel(server.url, model="m", ledger=ledger)) as large,
    ):
        large.next_token(context("a", VOCABULARY))
        request_count, before = len(server.requests), large.uploads
        ledger.close()
        for _ in range(3):
            with pytest.raises(LargeUnrecorded, match=r"sent cannot be written.*nothing more is"):
                large.next_token(context("b", VOCABULARY))
        assert large.uploads == before
    # The failure is noticed when the body is about to be sent, after the headers.
    assert [request.body for request in server.requests[request_count:]] in ([], [b""])
    assert ledger.failure is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_in_the_error(tmp_path: Path) -> None:
    with Ledger(Path("/dev/full")) as ledger:
        with pytest.raises(LargeUnrecorded, match="No space left"):
            ledger.record_request(URL, b"{}")
        assert ledger.uploads == Uploads()


def test_a_failed_call_counts_only_if_its_body_was_sent(
    server: Loopback, short_retry_pauses: None
) -> None:
    server.script.append(Reply(b"oops", status=501))
    with negotiated(LargeModel(server.url, model="m")) as large:
        with pytest.raises(LargeError):
            large.next_token(context("a", VOCABULARY))
        assert large.uploads == Uploads(requests=1, size_bytes=len(server.requests[0].body))
    server.script.extend([Reply(status=503), Reply.of(legacy("a"))])
    with negotiated(LargeModel(server.url, model="m")) as large:
        large.next_token(context("a", VOCABULARY))
        assert large.uploads.requests == 2
    with negotiated(LargeModel("http://127.0.0.1:9/v1", model="m")) as large:
        with pytest.raises(LargeError):
            large.next_token(context("a", VOCABULARY))
        assert large.uploads == Uploads()


def test_tokens_are_counted_by_the_server_else_by_the_small_model(
    server: Loopback,
) -> None:
    usage = {
        "prompt_tokens": 40,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 30},
    }
    with negotiated(LargeModel(server.url, model="m")) as large:
        before = large.uploads
        server.script.append(Reply.of(legacy(" the") | {"usage": usage}))
        large.next_token(context("a", VOCABULARY))
        after_counted = large.uploads
        server.script.append(Reply.of(legacy(" the") | {"usage": None}))
        uncounted_context = context("a the", VOCABULARY)
        large.next_token(uncounted_context)
        by_small_model = large.uploads - after_counted
    by_server = after_counted - before
    assert (by_server.tokens, by_server.cached_tokens) == (40, 30)
    assert by_server.completion_tokens == 2
    assert by_small_model.tokens == len(uncounted_context.token_ids)
    assert by_small_model.cached_tokens == 0
    assert by_small_model.completion_tokens == 1


def test_cached_tokens_never_exceed_prompt_tokens() -> None:
    ledger = Ledger()
    ledger.record_usage(prompt_tokens=10, cached_tokens=99, completion_tokens=0)
    assert ledger.uploads.cached_tokens == 10


def test_a_cost_has_a_separate_price_for_cached_tokens() -> None:
    prices = Prices(input=2.0, cached_input=0.5, output=8.0)
    uploads = Uploads(tokens=1_000_000, cached_tokens=600_000, completion_tokens=250_000)
    assert prices.cost(uploads) == pytest.approx(0.8 + 0.3 + 2.0)


@pytest.mark.parametrize("price", [-1, math.inf, "2"])
def test_a_price_that_cannot_be_is_refused(price: Any) -> None:
    with pytest.raises(UsageError, match=r"^cached_input must be .* per million tokens") as raised:
        Prices(input=2.0, cached_input=price, output=8.0)
    assert raised.value.parameter == "cached_input"


@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 5), min_size=2, max_size=2))
def test_uploads_can_be_added_and_subtracted(counts: list[tuple[int, ...]]) -> None:
    before, more = (Uploads(*totals) for totals in counts)
    assert (before + more) - before == more


def test_the_path_of_the_file_may_be_a_text(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    with Ledger(str(path)) as ledger:
        ledger.record_request(URL, b"{}")
    assert [line["body"] for line in lines(path)] == [{}]


def test_a_pipe_without_a_reader_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sent")
    with pytest.raises(UsageError, match="cannot be written"):
        Ledger(tmp_path / "sent")


def test_a_half_entry_of_an_earlier_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b'{"time": "2026')
    for _ in range(2):
        with Ledger(tmp_path / "sent") as ledger:
            ledger.record_request(URL, b"{}")
    half, *rest = (tmp_path / "sent").read_bytes().split(b"\n")
    assert half == b'{"time": "2026'
    assert [json.loads(row)["url"] for row in rest if row] == [URL, URL]
