"""Answer documents: what they say of each token, their JSON and their files."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxroute.answers import document as document_module
from mlxroute.answers.document import AnswerDocument, RouterRecord, TokenDecision
from mlxroute.answers.document_file import (
    format_document,
    load_document,
    parse_document,
    save_document,
)
from mlxroute.answers.record_json import to_json
from mlxroute.answers.router_record import record_router, restore_router
from mlxroute.errors import (
    LargeError,
    LargeRefused,
    LargeUnavailable,
    LargeUnrecorded,
    LargeUnsendable,
    UsageError,
)
from mlxroute.routers import EntropyRouter
from mlxroute.types import Source
from tests.support.documents import make_document, record_answer
from tests.support.scripted_models import EOS, ScriptedLarge, ScriptedSmall

KEYS = {
    "AnswerDocument": (
        "format version mlxroute created id messages prompt models router options summary tokens"
        " replies"
    ),
    "BudgetRecord": "resolution rank bucket recent",
    "Choice": "text logprob id bytes",
    "DocumentToken": (
        "index id text source score threshold judgement decision checked unchecked_reason"
        " prefetched small large time_s"
    ),
    "LargeChoice": "ids text ends logprob top latency_s",
    "ModelPair": "small small_spec adapter large large_url small_files",
    "OptionsRecord": (
        "mode prefetch call_ceiling accept_within max_tokens stop temperature top_p seed never_send"
        " top_k min_p"
    ),
    "PromptRecord": "tokens sha256 text",
    "RecordedReply": "after then tokens",
    "RecordedToken": "ids text ends logprob top top_bytes large_ids latency_s",
    "RouterRecord": "name threshold budget positions state head_sha256",
    "SmallChoice": "id text logprob entropy_nats margin top",
}


def decisions(document: AnswerDocument) -> list[str]:
    return [token.decision.value for token in document.tokens]


def test_each_class_has_these_keys_in_this_order() -> None:
    for name, keys in KEYS.items():
        kind = getattr(document_module, name)
        assert [item.name for item in fields(kind)] == keys.split()


def test_each_token_says_how_it_was_decided_and_what_both_models_chose() -> None:
    document = make_document(b"abcd", [b"b", b"xy", LargeRefused("no")], unsure=(1, 2, 4))
    assert decisions(document) == ["kept", "agreed", "replaced", "continued", "unchecked"]
    kept, agreed, replaced, part, unchecked = document.tokens
    assert kept.small is not None
    assert (kept.small.text, kept.large, kept.source) == ("a", None, Source.SMALL)
    assert replaced.large is not None
    assert replaced.small is not None
    assert (replaced.small.text, replaced.large.text, replaced.text) == ("c", "xy", "x")
    assert (part.small, part.large, part.text) == (None, None, "y")
    assert (agreed.checked, unchecked.checked) == (True, False)
    assert unchecked.unchecked_reason == "no"
    assert document.escalated_tokens == [agreed, replaced, unchecked]


def test_a_position_over_the_budget_is_said_to_be_so() -> None:
    small = ScriptedSmall(b"a" * 40, entropies={i: 2.0 + i / 10 for i in range(40)})
    answer = record_answer(small, ScriptedLarge([b"a"]), router=EntropyRouter(budget=0.07))
    assert list(answer)
    assert {TokenDecision.AGREED, TokenDecision.OVER_BUDGET} <= {
        token.decision for token in answer.document().tokens
    }


def test_a_token_without_a_call_says_why_it_is_unchecked() -> None:
    small = ScriptedSmall(b"ab", entropies={0: 2.0})
    answer = record_answer(small, None)
    assert list(answer)
    token = answer.document().tokens[0]
    assert not token.checked
    assert token.unchecked_reason == "no call was made: the answer has no large model"


@pytest.mark.parametrize("error", [LargeUnsendable, LargeUnrecorded, LargeUnavailable])
def test_a_token_whose_call_was_not_made_says_why(error: type[LargeError]) -> None:
    document = make_document(b"ab", [error("the reason"), b"x"], unsure=(0,))
    assert document.tokens[0].unchecked_reason == "the reason"
    assert document.summary.fallbacks == 0


def test_tokens_after_a_prompt_that_is_too_long_say_why_they_are_unchecked() -> None:
    document = make_document(b"abc", [LargeUnsendable("too long")], unsure=(0, 2))
    reasons = [token.unchecked_reason for token in document.tokens]
    assert reasons == ["too long", None, "too long", None]


def test_special_tokens_and_parts_of_characters_are_shown_with_their_bytes() -> None:
    document = make_document("é".encode(), [(EOS,)], unsure=(2,))
    first, _, end = document.tokens
    assert first.small is not None
    assert (first.text, first.small.text) == ("", "\\xc3")
    assert first.small.top[0].bytes == b"\xc3"
    assert end.large is not None
    assert (end.large.text, end.large.ends, end.text) == ("</s>", True, "")


def test_a_stopped_answer_has_a_document() -> None:
    answer = record_answer(ScriptedSmall(b"abc"), ScriptedLarge([b"x"]))
    stream = iter(answer)
    next(stream)
    document = answer.document()
    assert (len(document.tokens), document.summary.finish_reason.value) == (1, "cancelled")


def test_the_summary_gives_the_statistics_back() -> None:
    answer = record_answer(ScriptedSmall(b"abc", entropies={1: 2.0}), ScriptedLarge([b"x"]))
    assert list(answer)
    stats = answer.stats()
    read = answer.document().summary.stats()
    rounded = {
        item.name: round(getattr(stats, item.name), 6)
        for item in fields(stats)
        if item.name.endswith("_s")
    }
    assert read == replace(stats, **rounded)


def test_a_parsed_document_equals_the_formatted_one() -> None:
    document = make_document("a é.".encode(), ["é".encode(), LargeRefused("no")], unsure=(1, 2))
    endless = replace(document.router, threshold=-math.inf)
    for item in (document, replace(document, router=endless, id="x")):
        assert parse_document(format_document(item)) == item


def test_the_largest_seed_is_read_again() -> None:
    document = make_document()
    document = replace(document, options=replace(document.options, seed=2**64 - 1))
    assert parse_document(format_document(document)) == document


def test_unknown_keys_are_ignored() -> None:
    value = json.loads(format_document(make_document()))
    before = parse_document(json.dumps(value).encode())
    value["new"] = value["tokens"][0]["new"] = [1]
    assert parse_document(json.dumps(value).encode()) == before


def _change(key: str, content: Any) -> bytes:
    value = json.loads(format_document(make_document()))
    place: Any = value
    *path, last = key.split(".")
    for name in path:
        place = place[int(name) if name.isdigit() else name]
    if content is KeyError:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = content
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("format", "other", 'no "format": "mlxroute answer"'),
        ("version", 2, '"version" is not 1'),
        ("version", True, '"version" is not 1'),
        ("tokens", {}, "tokens is not a list"),
        ("tokens.1.small.logprob", "x", r"tokens\[1\]\.small\.logprob is not a number"),
        ("tokens.1.index", 7, "tokens are not numbered from 0"),
        ("tokens.1.id", 2**64, r"tokens\[1\]\.id is not an integer"),
        ("tokens.1.id", True, r"tokens\[1\]\.id is not an integer"),
        ("tokens.1.text", "\ud800", "half a surrogate pair"),
        ("tokens.0.source", "both", r"tokens\[0\]\.source is not one of small, large"),
        ("tokens.0.small.top.0.bytes", [256], r"top\[0\]\.bytes is not a list of bytes"),
        ("tokens.0.checked", 1, r"tokens\[0\]\.checked is not true or false"),
        ("summary.mode", KeyError, "summary.mode is missing"),
        ("messages", [], "messages is empty"),
        ("messages.0", {"role": "user"}, r'messages\[0\] has no "role" or no "content"'),
        ("messages.0", {"role": "user", "content": 1}, r"messages\[0\] is not text"),
        ("replies.0.after", 99, r"replies\[0\]\.after is not a position"),
        ("replies.0.tokens.0.ids", [], r"replies\[0\] has a token without ids"),
        ("prompt", None, "prompt is not an object"),
    ],
)
def test_a_wrong_document_is_refused_with_the_place(key: str, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_document(_change(key, content))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_an_error(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_document(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
_VALUE = json.loads(format_document(make_document()))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.sampled_from(_places(_VALUE)[1:]), _JSON)
def test_any_value_at_any_place_is_read_or_refused(path: tuple[Any, ...], content: Any) -> None:
    value = json.loads(json.dumps(_VALUE))
    place: Any = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = content
    try:
        document = parse_document(json.dumps(value).encode())
    except UsageError:
        return
    assert to_json(parse_document(format_document(document))) == to_json(document)


@pytest.mark.parametrize("data", [b"[" * 10**5, b'{"format": NaN}', b"9" * 10**5, b"\xff", b""])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_document(data)


def test_the_file_is_private_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    save_document(make_document(), path)
    document = make_document(b"other")
    save_document(document, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_document(path) == document
    assert list(tmp_path.iterdir()) == [path]


def test_saving_never_replaces_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(UsageError, match="is not a saved answer; choose another name"):
        save_document(make_document(), path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["no/such/folder/a.json", "a\0b", "."])
def test_a_file_that_cannot_be_written_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save_document(make_document(), tmp_path / name)


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_document(tmp_path / "none.json")
    with pytest.raises(UsageError, match="it is larger than 64 MiB"):
        load_document(Path("/dev/zero"))


def test_a_router_is_restored_in_its_state() -> None:
    router = EntropyRouter(budget=0.1)
    for score in (0.1, 3.0, 0.5):
        _, router.state = router.state.decide(score)
    restored = restore_router(record_router(router))
    assert (restored.name, restored.state) == (router.name, router.state)
    threshold = EntropyRouter(-math.inf)
    assert restore_router(record_router(threshold)).state == threshold.state


@pytest.mark.parametrize(
    "change",
    [
        {"name": "none"},
        {"budget": None},
        {"budget": 1.5},
        {"positions": -1},
        {"state": None},
        {"rank": 2.0},
        {"rank": math.nan},
        {"bucket": 1e9},
        {"resolution": 0.0},
        {"recent": ()},
        {"recent": (math.nan,)},
    ],
)
def test_a_router_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    record = record_router(EntropyRouter(budget=0.1))
    assert record.state is not None
    own = {item.name for item in fields(RouterRecord)}
    state = {name: value for name, value in change.items() if name not in own}
    record = replace(record, state=replace(record.state, **state))
    with pytest.raises(UsageError):
        restore_router(replace(record, **{n: v for n, v in change.items() if n in own}))
