"""Recorded replies of the large model: bounded calls, the file, the end of a run."""

from __future__ import annotations

import json
import math
import re
import resource
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from mlxroute.cli.model_pair import open_recording
from mlxroute.config import Settings
from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, UsageError
from mlxroute.recorded.large_answers import LargeAnswer, write_large_answers
from mlxroute.recorded.large_choices import WrittenAnswer, find_large_choices
from mlxroute.recorded.parallel_answers import map_answers
from mlxroute.recorded.recording_large import AnswerNotContinued, RecordingLarge
from mlxroute.recorded.reply_file import ReplyFile
from mlxroute.types import LargeContext, LargeToken, Message, Uploads, Vocabulary
from tests.support.scripted_models import (
    EOS,
    ByteVocabulary,
    ScriptedLarge,
    ScriptedReply,
    ScriptedSmall,
    ScriptedWholeAnswer,
    TwoEndVocabulary,
)

# A line as earlier versions wrote it, for the token after the ids 1, 70.
_LINE = (
    '{"key": "7fe43e8e8e7bc21bc9d711b46614437b", "token_ids": [71, 72], "text": "GH",'
    ' "is_eos": false, "logprob": -0.5, "top": [["GH", -0.5], ["G", -1.5]], "prompt_tokens": 10,'
    ' "cached_tokens": 8, "completion_tokens": 1, "uploaded_bytes": 100, "latency_s": 0.25,'
    ' "large_ids": [5], "lost_s": 0.0}\n'
)
if TYPE_CHECKING:
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

_TOKEN = LargeToken(
    token_ids=(71, 72),
    text="GH",
    is_eos=False,
    logprob=-0.5,
    top=(("GH", -0.5), ("G", -1.5)),
    prompt_tokens=10,
    cached_tokens=8,
    completion_tokens=1,
    uploaded_bytes=100,
    latency_s=0.25,
    large_ids=(5,),
)


class BlockedCall:
    """A call that finishes when the test says so."""

    def __init__(self, large: BlockingLarge, tokens: tuple[LargeToken, ...]) -> None:
        self._large = large
        self._tokens = tokens
        self.ready = False

    @property
    def finished(self) -> bool:
        return self.ready

    def result(self) -> tuple[LargeToken, ...]:
        self._large.in_flight -= 1
        return self._tokens

    def cancel(self) -> None:
        self._large.in_flight -= 1


class BlockingLarge(ScriptedLarge):
    """A large model whose calls finish by `finish_calls`; counts the calls in flight."""

    def __init__(self, replies: list[ScriptedReply]) -> None:
        super().__init__(replies)
        self.calls: list[BlockedCall] = []
        self.in_flight = self.max_seen_in_flight = 0
        self.changed = threading.Condition()

    def begin(  # type: ignore[override]
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> BlockedCall:
        scripted = super().begin(context, deadline_s=deadline_s, prefetch=prefetch)
        call = BlockedCall(self, scripted.result())
        with self.changed:
            self.calls.append(call)
            self.in_flight += 1
            self.max_seen_in_flight = max(self.max_seen_in_flight, self.in_flight)
            self.changed.notify_all()
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self.changed:
            self.changed.wait_for(ready, timeout_s)

    def finish_calls(self, count: int) -> None:
        """Finish `count` calls, once that many are in flight."""
        with self.changed:
            self.changed.wait_for(lambda: sum(not call.ready for call in self.calls) >= count)
            for call in [call for call in self.calls if not call.ready][:count]:
                call.ready = True
            self.changed.notify_all()


def context(*ids: int) -> LargeContext:
    return LargeContext(
        text="", token_ids=ids, fragment_ids=(), vocabulary=cast("Vocabulary", None)
    )


def ask(recording: RecordingLarge, *ids: int, prefetch: int = 0) -> tuple[LargeToken, ...]:
    """Return what a new view answers to a context."""
    view = recording.new_view()
    call = view.begin(context(*ids), deadline_s=9, prefetch=prefetch)
    view.wait(lambda: call.ready, timeout_s=9)
    return call.result()


def test_no_more_calls_are_in_flight_than_allowed(tmp_path: Path) -> None:
    large = BlockingLarge([(70,)])
    recording = RecordingLarge(large, tmp_path / "r", at_once=2)
    threads = [threading.Thread(target=ask, args=(recording, i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        large.finish_calls(2)
    for thread in threads:
        thread.join()
    assert (large.max_seen_in_flight, len(large.calls)) == (2, 6)


def test_a_text_that_a_pattern_matches_is_not_sent(tmp_path: Path) -> None:
    large = ScriptedLarge([(70,)])
    recording = RecordingLarge(large, tmp_path / "r", never_send=[re.compile("zebra")])
    in_answer = replace(context(1), text="It is a zebra")
    in_prompt = replace(context(1), messages=({"role": "user", "content": "A zebra?"},))
    for matching in (in_answer, in_prompt):
        with pytest.raises(UsageError, match="matches never-send pattern 1"):
            recording.new_view().begin(matching, deadline_s=9, prefetch=0)
    assert large.contexts == []
    assert ask(recording, 1)[0].token_ids == (70,)


def test_only_the_owner_can_read_recorded_replies(tmp_path: Path) -> None:
    ask(RecordingLarge(ScriptedLarge([(70,)]), tmp_path / "r"), 1)
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o600


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first, second = ReplyFile(path), ReplyFile(path)
    first.add_tokens((1, 69), [_TOKEN])
    rows = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(rows) + 20, limits[1]))
    try:
        with pytest.raises(UsageError, match="cannot be written: File too large"):
            first.add_tokens((1, 70), [_TOKEN])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == rows
    # Another run has the file open in the meantime, and a third one reads it.
    second.add_tokens((1, 80), [_TOKEN])
    third = ReplyFile(path)
    assert third.find_tokens((1, 69), 1) == third.find_tokens((1, 80), 1) == (_TOKEN,)


def test_recorded_tokens_are_returned_as_far_as_they_follow_each_other(tmp_path: Path) -> None:
    large = ScriptedLarge([(70,), (71, 72), (73,)])
    recording = RecordingLarge(large, tmp_path / "r")
    assert ask(recording, 1)[0].token_ids == (70,)
    assert ask(recording, 1, 70)[0].token_ids == (71, 72)
    failing = ScriptedLarge([LargeError("called again")])
    reopened = RecordingLarge(failing, tmp_path / "r")
    assert [token.token_ids for token in ask(reopened, 1, prefetch=5)] == [(70,), (71, 72)]
    assert len(ask(reopened, 1, prefetch=0)) == 1
    assert failing.contexts == []
    view = reopened.new_view()
    call = view.begin(context(1), deadline_s=9, prefetch=0)
    # The engine reads the result of a call more than once.
    assert call.result() == call.result()
    assert (view.uploads.requests, view.uploads.tokens, view.uploads.completion_tokens) == (
        1,
        10,
        1,
    )


def test_a_call_counts_once_however_often_its_result_is_read(tmp_path: Path) -> None:
    large = BlockingLarge([(70,)])
    view = RecordingLarge(large, tmp_path / "r").new_view()
    call = view.begin(context(1), deadline_s=9, prefetch=0)
    large.finish_calls(1)
    assert call.result() == call.result()
    assert view.uploads.requests == 1


def test_a_call_takes_until_its_last_token(tmp_path: Path) -> None:
    streamed = [replace(_TOKEN, latency_s=seconds) for seconds in (0.25, 0.5, 2.0)]
    # Without a stream the later tokens have no times of their own.
    whole = [_TOKEN, *[replace(_TOKEN, latency_s=0.0)] * 2]
    for name, tokens, seconds in (("streamed", streamed, 2.0), ("whole", whole, 0.25)):
        recording = RecordingLarge(ScriptedLarge([LargeError("called again")]), tmp_path / name)
        recording.replies.add_tokens((1,), tokens)
        view = recording.new_view()
        assert len(view.begin(context(1), deadline_s=9, prefetch=9).result()) == 3
        assert view.calls_s == seconds


def test_the_file_has_one_line_of_named_values_per_token(tmp_path: Path) -> None:
    file = tmp_path / "r"
    ReplyFile(file).add_tokens((1, 70), [_TOKEN])
    assert file.read_text() == _LINE
    assert list(json.loads(_LINE)) == [
        "key",
        "token_ids",
        "text",
        "is_eos",
        "logprob",
        "top",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "uploaded_bytes",
        "latency_s",
        "large_ids",
        "lost_s",
    ]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r"
    file.write_text(_LINE)
    replies = ReplyFile(file)
    assert replies.find_tokens((1, 70), 3) == (_TOKEN,)
    assert replies.find_tokens((1, 71), 3) == ()


def test_waiting_answers_fail_once_the_run_has_ended(tmp_path: Path) -> None:
    large = BlockingLarge([(70,)])
    recording = RecordingLarge(large, tmp_path / "r")
    failures: list[LargeError] = []

    def ask_and_fail(number: int) -> None:
        try:
            ask(recording, number)
        except LargeError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=ask_and_fail, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    recording.close()
    for thread in threads:
        thread.join()
    assert len(failures) == 2
    with pytest.raises(LargeError, match="ended"):
        ask(recording, 9)


def test_generated_tokens_beyond_the_answer_are_counted() -> None:
    token = replace(_TOKEN, completion_tokens=40)
    assert Uploads.of_call(context(1), [token]).completion_tokens == 40
    assert Uploads.of_call(context(1), [token, *[_TOKEN] * 60]).completion_tokens == 61
    unknown = replace(_TOKEN, completion_tokens=None)
    assert Uploads.of_call(context(1), [unknown]).completion_tokens == 1


def write_answer(
    large: ScriptedLarge, record: Path, *, vocabulary: ByteVocabulary | None = None
) -> LargeAnswer:
    """Return the large model's answer of at most 9 tokens to one question."""
    (answer,) = write_large_answers(
        ScriptedSmall(b"", vocabulary=vocabulary),
        RecordingLarge(large, record),
        [[{"role": "user", "content": "hi"}]],
        max_tokens=9,
        at_once=1,
        on_answer=lambda: None,
    )
    return answer


def test_answers_of_a_server_that_only_chats_are_asked_for_as_wholes(tmp_path: Path) -> None:
    large = ScriptedLarge([LargeError("a call for a token")])
    large.is_approximate, large.whole_answer = True, ScriptedWholeAnswer("hello")
    conversation = [{"role": "user", "content": "hi"}]
    for max_tokens, ids in [(9, (*b"hello", EOS)), (5, tuple(b"hello")), (2, tuple(b"he"))]:
        (answer,) = write_large_answers(
            ScriptedSmall(b""),
            RecordingLarge(large, tmp_path / "r"),
            [conversation],
            max_tokens=max_tokens,
            at_once=1,
            on_answer=lambda: None,
        )
        assert answer.token_ids == ids
        assert answer.token_starts == tuple(range(len(ids)))
        assert all(map(math.isnan, answer.logprobs))
    assert large.whole_answer.conversations == [conversation] * 3
    again = RecordingLarge(large, tmp_path / "r").write_whole_answer(conversation, max_tokens=9)
    assert (again.text, again.ends, again.prompt_tokens) == ("hello", True, 10)
    assert large.whole_answer.conversations == [conversation] * 3


def test_an_answer_that_a_server_withholds_only_ends(tmp_path: Path) -> None:
    large = ScriptedLarge([LargeError("a call for a token")])
    large.is_approximate, large.whole_answer = True, ScriptedWholeAnswer("", ends=False)
    answer = write_answer(large, tmp_path / "r")
    assert answer.token_ids == (EOS,)


def test_the_end_of_a_run_cancels_whole_answers(tmp_path: Path) -> None:
    class Waiting(ScriptedWholeAnswer):
        def answer(self, messages: Sequence[Message], *, max_tokens: int) -> ScriptedWholeAnswer:
            recording.close()
            assert self.is_cancelled
            raise LargeError("cancelled")

    large = ScriptedLarge([b"a"])
    large.whole_answer = waiting = Waiting("never")
    recording = RecordingLarge(large, tmp_path / "r")
    conversation: list[Message] = [{"role": "user", "content": "hi"}]
    with pytest.raises(LargeError, match="cancelled"):
        recording.write_whole_answer(conversation, max_tokens=9)
    large.whole_answer = ScriptedWholeAnswer("late")
    with pytest.raises(LargeError, match="ended"):
        recording.write_whole_answer(conversation, max_tokens=9)
    assert (waiting.conversations, large.whole_answer.conversations) == ([], [])


def test_records_are_found_by_the_full_name_of_the_model(tmp_path: Path) -> None:
    large = ScriptedLarge([b"a"])
    large.full_model_name = "/runs/1/step-500"
    recording = RecordingLarge(large, tmp_path / "r")
    assert recording.recorded_name == "/runs/1/step-500"
    large.is_approximate = True
    assert recording.recorded_name == "/runs/1/step-500-by-example"


def test_an_answer_that_the_server_does_not_go_on_with_is_asked_for_as_a_whole(
    tmp_path: Path,
) -> None:
    large = ScriptedLarge([(104,), LargeNotContinued("inside a character")])
    large.whole_answer = ScriptedWholeAnswer("other")
    answer = write_answer(large, tmp_path / "r")
    assert answer.token_ids == (*b"other", EOS)


def test_an_answer_holds_what_the_large_model_might_have_written_instead(tmp_path: Path) -> None:
    first = replace(
        _TOKEN,
        token_ids=tuple(b"hi"),
        text="hi",
        logprob=-0.5,
        top=(("hi", -0.5), ("ho", -1.0), ("abc", -2.0), ("\\xff", -2.5), ("", -3.0)),
        top_bytes=((b"hi", -0.5), (b"ho", -1.0), (b"abc", -2.0), (b"\xff", -2.5)),
    )
    unknown = replace(first, logprob=None)
    impossible = replace(first, logprob=-1e4)
    without = replace(first, top_bytes=())
    last = replace(
        first,
        token_ids=(EOS,),
        text="",
        is_eos=True,
        top=(("", -0.5), ("abc", -2.0)),
        top_bytes=((b"abc", -2.0),),
        end_logprob=-0.4,
    )
    answer = write_answer(
        ScriptedLarge([first, unknown, impossible, without, last]), tmp_path / "r"
    )
    assert (answer.token_ids, answer.token_starts) == ((*b"hihihihi", EOS), (0, 2, 4, 6, 8))
    # "hi" and "ho" begin with the same token. Special tokens that end nothing, and parts of
    # characters, are left out.
    h = math.exp(-0.5) + math.exp(-1.0)
    choices, *others, end = map(dict, answer.choices)
    assert choices == pytest.approx({ord("h"): h, ord("a"): math.exp(-2.0)})
    assert others == [{}, {}, {}]
    assert end == pytest.approx({EOS: math.exp(-0.4), ord("a"): math.exp(-2.0)})


def test_an_answer_holds_where_the_large_model_might_have_ended_it(tmp_path: Path) -> None:
    also = replace(_TOKEN, token_ids=(ord("a"),), text="a", logprob=-0.5, top_bytes=((b"a", -0.5),))
    end = replace(also, end_logprob=-0.75)
    scripts: list[list[ScriptedReply]] = [[end, b"b"], [LargeError("a second call")]]
    for script in scripts:
        answer = write_answer(ScriptedLarge(script), tmp_path / "r")
        expected = {ord("a"): math.exp(-0.5), EOS: math.exp(-0.75)}
        assert dict(answer.choices[0]) == pytest.approx(expected)


def test_answers_and_choices_end_with_the_small_models_own_end_token(tmp_path: Path) -> None:
    vocabulary = TwoEndVocabulary()
    end = replace(_TOKEN, token_ids=(0,), text="", is_eos=True, top_bytes=((b"abc", -2.0),))
    answer = write_answer(ScriptedLarge([b"a", end]), tmp_path / "a", vocabulary=vocabulary)
    assert answer.token_ids == (ord("a"), EOS)
    assert {EOS, ord("a")} == dict(answer.choices[1]).keys()
    chatting = ScriptedLarge([LargeError("a call for a token")])
    chatting.is_approximate, chatting.whole_answer = True, ScriptedWholeAnswer("hello")
    answer = write_answer(chatting, tmp_path / "b", vocabulary=vocabulary)
    assert answer.token_ids == (*b"hello", EOS)
    (choices,) = find_large_choices(
        ScriptedSmall(b"", vocabulary=vocabulary),
        RecordingLarge(ScriptedLarge([end]), tmp_path / "c"),
        [WrittenAnswer([{"role": "user", "content": "hi"}], (), is_whole=True)],
        at_once=1,
        on_answer=lambda: None,
    )
    assert choices == [EOS]


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_large_token_is_no_choice_beyond_the_end_of_an_answer(
    is_whole: bool, tmp_path: Path
) -> None:
    answer = WrittenAnswer([{"role": "user", "content": "hi"}], tuple(b"abc"), is_whole)
    (choices,) = find_large_choices(
        ScriptedSmall(b""),
        RecordingLarge(ScriptedLarge([b"abcd"]), tmp_path / "r"),
        [answer],
        at_once=1,
        on_answer=lambda: None,
    )
    assert bytes(choices) == (b"abcd" if is_whole else b"abc")


def test_no_call_of_a_recording_takes_longer_than_its_time_limit(tmp_path: Path) -> None:
    conversation: list[Message] = [{"role": "user", "content": "hi"}]
    for timeout_s in (1234.0, 900.0):
        large = ScriptedLarge([(104,), (EOS,)])
        recording = RecordingLarge(large, tmp_path / f"{timeout_s}", timeout_s=timeout_s)
        (written,) = write_large_answers(
            ScriptedSmall(b""),
            recording,
            [conversation],
            max_tokens=9,
            at_once=1,
            on_answer=lambda: None,
        )
        assert written.token_ids == (104, EOS)
        assert large.deadlines == [pytest.approx(timeout_s, abs=60)] * 2
        other = RecordingLarge(large, tmp_path / f"{timeout_s} other", timeout_s=timeout_s)
        answer = WrittenAnswer(conversation, (105,), is_whole=False)
        find_large_choices(ScriptedSmall(b""), other, [answer], at_once=1, on_answer=lambda: None)
        assert large.deadlines[2:] == [timeout_s]
        recording.write_whole_answer(conversation, max_tokens=9)
        recording.score(context(1), context(1))
        assert large.whole_limits == [timeout_s] * 2


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(30.0, 600.0), (3600.0, 3600.0)])
def test_recording_commands_give_a_call_the_longer_of_their_limit_and_the_settings(
    tmp_path: Path, timeout_s: float, limit_s: float
) -> None:
    settings = Settings(timeout=timeout_s, cache_dir=str(tmp_path))
    small = cast("SmallModel", SimpleNamespace(plain_name="s"))
    large = cast("LargeModel", ScriptedLarge([b"a"]))
    with open_recording(settings, small, large, at_once=1) as recording:
        assert recording.timeout_s == limit_s
    assert cast("ScriptedLarge", large).longest_call_s == limit_s


def test_a_position_without_an_answer_is_a_failure_where_the_large_model_writes_alone(
    tmp_path: Path,
) -> None:
    large = ScriptedLarge([LargeNotContinued("inside a character")])
    recording = RecordingLarge(large, tmp_path / "r")
    for large_only, error in [(False, LargeNotContinued), (True, AnswerNotContinued)]:
        view = recording.new_view(large_only=large_only)
        call = view.begin(context(1), deadline_s=1, prefetch=0)
        with pytest.raises(LargeProtocolError, match="inside a character") as caught:
            call.result()
        assert type(caught.value) is error


def test_the_first_failure_of_any_answer_ends_the_others() -> None:
    closed = threading.Event()
    recording = cast(RecordingLarge, SimpleNamespace(close=closed.set))

    def answer(number: int) -> int:
        if number == 1:
            raise UsageError("the second answer")
        if not closed.wait(20):
            raise AssertionError("the others are not ended")
        raise LargeError("closed")

    with pytest.raises(UsageError, match="the second answer"):
        map_answers(answer, range(3), large=recording, at_once=3, on_answer=lambda: None)
