"""The scheduler: answers as written alone, calls that hold nobody, cancellation, the queue."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.engine import generate
from mlxroute.errors import ContextTooLong, LargeRefused, UsageError
from mlxroute.routers import Router, make_router
from mlxroute.serving import (
    AnswerRequest,
    AnswerScheduler,
    PromptProgress,
    QueueFull,
    RunningAnswer,
    SchedulerClosed,
)
from mlxroute.serving.device_thread import DeviceClosed
from mlxroute.serving.prompts import encode_prompt
from mlxroute.serving.sequence import DecodedSequence
from mlxroute.serving.small_client import AnswerCancelled, SmallClient
from mlxroute.small import SmallModel
from mlxroute.types import LargeContext, Mode, Sampling, Signals, StopReason, Token
from tests.serving.conftest import (
    PROMPTS,
    TOKENS,
    ReleasedLarge,
    alone,
    choose_by_text,
    held,
    messages,
    request,
    written,
)
from tests.support.batch_start import start_batch_of
from tests.support.tiny import KINDS, make_tiny_model

_SAMPLING = Sampling(temperature=1.0, top_p=0.95, seed=11)
# A threshold that random weights exceed at some positions.
_SOMETIMES = 5.58
_ROUNDING_NATS = 0.05


def choose(context: LargeContext) -> int:
    return choose_by_text(context.token_ids)


def finish_reason(answer: RunningAnswer) -> StopReason:
    stats = answer.stats
    assert stats is not None
    return stats.finish_reason


def wait_until(condition: Any) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_one_answer_is_decoded_as_one_row(scheduler: AnswerScheduler, small: SmallModel) -> None:
    answer = scheduler.submit(request(PROMPTS[0]))
    events = list(answer.events())
    assert [e.token_id for e in events if isinstance(e, Token)] == alone(small, PROMPTS[0])
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert progress[-1].done == progress[-1].total == len(answer.prompt.ids)
    assert finish_reason(answer) is StopReason.LENGTH
    assert scheduler.figures().batched_tokens == 0


@pytest.mark.parametrize("exact", [False, True])
def test_answers_of_a_batch_are_what_each_would_be_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    row_counts = start_batch_of(len(PROMPTS), scheduler, monkeypatch)
    answers = [scheduler.submit(request(prompt, exact=exact)) for prompt in PROMPTS]
    assert [written(answer) for answer in answers] == [alone(small, p) for p in PROMPTS]
    assert row_counts[0] == len(PROMPTS)
    assert scheduler.figures().batched_tokens > 0


def test_sampled_answers_of_a_batch_are_what_each_would_be_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(small, p, temperature=1.0, top_p=0.95, seed=11) for p in PROMPTS[:2]]
    row_counts = start_batch_of(3, scheduler, monkeypatch)
    sampled = [scheduler.submit(request(p, sampling=_SAMPLING)) for p in PROMPTS[:2]]
    greedy = scheduler.submit(request(PROMPTS[2]))
    assert [written(answer) for answer in sampled] == expected
    assert written(greedy) == alone(small, PROMPTS[2])
    assert row_counts[0] == 3


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", list(Mode))
def test_routed_answers_of_a_batch_are_what_each_would_be_alone(
    small: SmallModel, mode: Mode, exact: bool
) -> None:
    large = ReleasedLarge(choose)
    expected = [alone(small, p, large=large, threshold=_SOMETIMES, mode="wait") for p in PROMPTS]
    with AnswerScheduler(small, large) as scheduler:
        with held(scheduler):
            answers = [
                scheduler.submit(request(p, threshold=_SOMETIMES, mode=mode, exact=exact))
                for p in PROMPTS
            ]
        assert [written(answer) for answer in answers] == expected
        for answer in answers:
            stats = answer.stats
            assert stats is not None
            assert stats.escalated
            assert stats.uploaded_bytes == 10 * stats.calls == 10 * stats.requests


def test_an_answer_that_waits_for_the_large_model_holds_no_other(small: SmallModel) -> None:
    large = ReleasedLarge(choose, holds=True)
    with AnswerScheduler(small, large) as scheduler:
        waiting = scheduler.submit(request(PROMPTS[0], threshold=-math.inf, mode=Mode.WAIT))
        large.await_calls(1)
        assert written(scheduler.submit(request(PROMPTS[1]))) == alone(small, PROMPTS[1])
        assert not waiting.ended
        large.release()
        expected = alone(small, PROMPTS[0], large=ReleasedLarge(choose), threshold=-math.inf)
        assert written(waiting) == expected
        stats = waiting.stats
        assert stats is not None
        assert stats.stall_s > 0


def test_a_failing_large_model_leaves_positions_unchecked(small: SmallModel) -> None:
    large = ReleasedLarge(lambda context: LargeRefused("no"))
    with AnswerScheduler(small, large) as scheduler:
        with held(scheduler):
            answers = [scheduler.submit(request(p, threshold=_SOMETIMES)) for p in PROMPTS]
        assert [written(answer) for answer in answers] == [alone(small, p) for p in PROMPTS]
        all_stats = [answer.stats for answer in answers]
    assert all(stats is not None and stats.unchecked == stats.fallbacks > 0 for stats in all_stats)


def test_a_local_answer_makes_no_call(small: SmallModel) -> None:
    large = ReleasedLarge(choose)
    with AnswerScheduler(small, large) as scheduler:
        answer = scheduler.submit(request(PROMPTS[0], threshold=-math.inf, local_only=True))
        assert written(answer) == alone(small, PROMPTS[0])
    stats = answer.stats
    assert stats is not None
    assert stats.unchecked == 0
    assert not large.calls


def test_a_cancelled_answer_ends_within_a_step(scheduler: AnswerScheduler) -> None:
    answer = scheduler.submit(request(PROMPTS[0], max_tokens=400))
    other = scheduler.submit(request(PROMPTS[1]))
    events = answer.events()
    for event in events:
        if isinstance(event, Token):
            answer.cancel()
            break
    later = [event for event in events if isinstance(event, Token)]
    assert len(later) < 400
    assert finish_reason(answer) is StopReason.CANCELLED
    assert written(other)
    # The KV cache of the cancelled answer is kept for its next try.
    assert scheduler.figures().cache_entries >= 1


def test_a_cancelled_call_ends_with_its_answer(small: SmallModel) -> None:
    large = ReleasedLarge(choose, holds=True)
    with AnswerScheduler(small, large) as scheduler:
        answer = scheduler.submit(request(PROMPTS[0], threshold=-math.inf, mode=Mode.WAIT))
        large.await_calls(1)
        answer.cancel()
        assert written(answer) == []
        assert large.calls[0].is_cancelled


def test_a_prompt_that_is_read_can_be_cancelled(scheduler: AnswerScheduler) -> None:
    with held(scheduler):
        answer = scheduler.submit(request("Thursday " * 40))
        wait_until(lambda: not scheduler._device._inbox.empty())
        answer.cancel()
    assert written(answer) == []
    figures = scheduler.figures()
    assert figures.cache_entries == figures.steps == 0


def test_a_prompt_whose_client_left_goes_on_after_its_last_whole_chunk(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request("Thursday " * 40)
    expected = alone(small, "Thursday " * 40)
    monkeypatch.setattr("mlxroute.small.model.PREFILL_STEP_SIZE", 32)
    client = scheduler._device.new_client(encode_prompt(small, asked.prompt))

    def leave(label: str, done: int, total: int | None) -> None:
        if done >= 64:
            client.cancel()

    with pytest.raises(AnswerCancelled):
        client.prefill(client.prompt.ids, sampling=Sampling(), progress=leave)
    client.release()
    assert scheduler.figures().cache_entries == 1
    answer = scheduler.submit(asked)
    assert written(answer) == expected
    assert answer.stats is not None
    assert answer.stats.cached_prompt_tokens == 64


def test_a_prompt_that_is_too_large_to_keep_displaces_no_other(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.small.model.PREFILL_STEP_SIZE", 32)
    asked = request(PROMPTS[3])
    with AnswerScheduler(small, None) as scheduler:
        written(scheduler.submit(asked))
        kept_bytes = scheduler.figures().cache_bytes
    # The first chunks would fit, but only without the other prompt.
    with AnswerScheduler(small, None, cache_bytes=kept_bytes * 3 // 2) as scheduler:
        written(scheduler.submit(asked))
        written(scheduler.submit(replace(asked, prompt=[5 + i % 250 for i in range(300)])))
        again = scheduler.submit(asked)
        written(again)
    assert again.stats is not None
    assert again.stats.cached_prompt_tokens == len(again.prompt.ids) - 1


def test_the_scoring_of_a_prompt_can_be_stopped_between_its_parts(
    scheduler: AnswerScheduler,
) -> None:
    # A third part would ask a third time.
    are_stopped = iter([False, True])
    with pytest.raises(AnswerCancelled):
        scheduler.score([65] * 400, is_stopped=lambda: next(are_stopped))
    assert len(scheduler.score([65] * 400).logprobs) == 399


def test_answers_wait_in_order_for_their_turn(small: SmallModel) -> None:
    with AnswerScheduler(small, None, max_running=1, max_queued=2) as scheduler:
        with held(scheduler):
            answers = [scheduler.submit(request(PROMPTS[0])) for _ in range(3)]
            submitted_s = time.perf_counter()
            with pytest.raises(QueueFull):
                scheduler.submit(request(PROMPTS[0]))
            assert (scheduler.figures().running, scheduler.figures().queued) == (1, 2)
            answers[1].cancel()
            assert written(answers[1]) == []
            assert scheduler.figures().queued == 1
            least_wait_s = time.perf_counter() - submitted_s
        assert written(answers[0]) == written(answers[2]) == alone(small, PROMPTS[0])
        assert answers[2].queue_wait_s >= least_wait_s
        assert written(scheduler.submit(request(PROMPTS[0])))


def test_an_answer_whose_thread_cannot_start_gives_its_turn_back(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with AnswerScheduler(small, None, max_running=1) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr("mlxroute.serving.scheduler.threading.Thread.start", refuse)
            answers = [scheduler.submit(request(PROMPTS[0])) for _ in range(2)]
        for answer in answers:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                written(answer)
            assert answer.ended
        assert written(scheduler.submit(request(PROMPTS[0]))) == alone(small, PROMPTS[0])


def test_a_bad_prompt_is_refused_before_it_waits(scheduler: AnswerScheduler) -> None:
    with pytest.raises(ContextTooLong):
        scheduler.submit(request("Thursday " * 500))
    with pytest.raises(UsageError, match="there is no token"):
        scheduler.submit(AnswerRequest([10**6], request("x").router))
    with pytest.raises(UsageError, match="empty"):
        scheduler.submit(AnswerRequest("", request("x").router))


def test_texts_and_token_ids_are_continued_as_they_are(
    scheduler: AnswerScheduler, small: SmallModel
) -> None:
    encoded = small.encode_conversation([{"role": "user", "content": PROMPTS[0]}])
    for prompt in (encoded.text, list(encoded.ids)):
        answer = scheduler.submit(AnswerRequest(prompt, request("x").router, request("x").options))
        assert answer.prompt.text == encoded.text
        assert written(answer) == alone(small, PROMPTS[0])


def test_plain_text_in_token_ids_is_marked_as_no_control_token(small: SmallModel) -> None:
    name = next(iter(sorted(small.vocabulary.control_names)))
    plain = small.vocabulary.encode(f"é {name} b")
    ids = [*plain, small.vocabulary.control_ids[name], *plain]
    rendered = encode_prompt(small, ids).encoded.rendered
    assert rendered.text == f"é {name} b{name}é {name} b"
    first, second, third = (match.span() for match in re.finditer(re.escape(name), rendered.text))
    assert [rendered.has_content(*span) for span in (first, second, third)] == [True, False, True]


def test_a_second_turn_reads_the_new_tokens_only(
    scheduler: AnswerScheduler, small: SmallModel
) -> None:
    first = scheduler.submit(request(PROMPTS[3]))
    ids = [*first.prompt.ids, *written(first)]
    following = AnswerRequest([*ids, 70, 71], request("x").router, request("x").options)
    second = scheduler.submit(following)
    written(second)
    stats = second.stats
    assert stats is not None
    # The last token of an answer is never fed.
    assert stats.cached_prompt_tokens == len(ids) - 1
    exact = scheduler.submit(replace(following, exact=True))
    assert written(exact)
    stats = exact.stats
    assert stats is not None
    assert stats.cached_prompt_tokens == 0


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["decoded", "decoded and kept"])
def test_answers_of_different_owners_share_no_kv_cache(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    with AnswerScheduler(small, None, cache_bytes=cache_bytes) as scheduler:
        start_batch_of(3, scheduler, monkeypatch)
        answers = [
            scheduler.submit(replace(request(PROMPTS[3]), owner=owner)) for owner in ("a", "b", "a")
        ]
        cached = []
        for answer in answers:
            assert written(answer)
            assert answer.stats is not None
            cached.append(answer.stats.cached_prompt_tokens)
    assert cached[1] == 0
    # Whichever of the two is read first.
    assert sorted([cached[0], cached[2]]) == [0, len(answers[0].prompt.ids) - 1]


def test_answers_that_outgrow_the_memory_of_the_batch_go_on_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5 + (first + 7 * i) % 250 for i in range(245)] for first in range(3)]
    batch = scheduler._device._batch
    step, sizes = batch.step, []

    def measured(token_ids: Any, **options: Any) -> Any:
        rows = step(token_ids, **options)
        sizes.append((batch.size_bytes, len(token_ids)))
        return rows

    monkeypatch.setattr(batch, "step", measured)
    expected = [
        written(scheduler.submit(AnswerRequest(ids, request("x").router, request("x").options)))
        for ids in prompts
    ]
    start_batch_of(3, scheduler, monkeypatch)
    with monkeypatch.context() as patch:
        layers = small.with_own_cache()
        layers.prefill(prompts[0])
        token_bytes = sum(layer.nbytes for layer in layers.decoder.cache.layers) // 256
        limit = 7 * 256 * token_bytes
        patch.setattr("mlxroute.small.row_batch._MAX_BYTES", limit)
        answers = [
            scheduler.submit(AnswerRequest(ids, request("x").router, request("x").options))
            for ids in prompts
        ]
        assert [written(answer) for answer in answers] == expected
    assert max(count for _, count in sizes) == 3
    assert max(size for size, _ in sizes) <= limit
    assert scheduler.figures().single_tokens > 3 * TOKENS


def test_a_failed_join_ends_its_answer_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = scheduler._device._batch
    resize, failures = batch._resize, [RuntimeError("no memory")]

    def fail_once(layers: Any) -> None:
        if failures:
            raise failures.pop()
        resize(layers)

    monkeypatch.setattr(batch, "_resize", fail_once)
    start_batch_of(3, scheduler, monkeypatch)
    answers = [scheduler.submit(request(prompt)) for prompt in PROMPTS[:3]]
    texts: list[list[int] | None] = []
    for answer in answers:
        try:
            texts.append(written(answer))
        except RuntimeError:
            texts.append(None)
    assert texts.count(None) == 1
    for text, prompt in zip(texts, PROMPTS, strict=False):
        assert text is None or text == alone(small, prompt)
    assert len(batch) == batch.size_bytes == 0


def test_a_failed_step_ends_the_answers_of_the_batch_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(token_ids: object, **options: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler._device._batch, "step", fail)
        start_batch_of(2, scheduler, monkeypatch)
        answers = [scheduler.submit(request(prompt)) for prompt in PROMPTS[:2]]
        for answer in answers:
            with pytest.raises(RuntimeError, match="no memory"):
                written(answer)
    assert written(scheduler.submit(request(PROMPTS[0]))) == alone(small, PROMPTS[0])


def test_a_failed_step_ends_an_answer_that_waits_for_the_large_model_with_its_error(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ReleasedLarge(choose, holds=True)
    with AnswerScheduler(small, large) as scheduler:
        batch = scheduler._device._batch
        step = batch.step

        def fail_during_call(token_ids: Any, **options: Any) -> Any:
            if large.calls:
                raise RuntimeError("no memory")
            return step(token_ids, **options)

        monkeypatch.setattr(batch, "step", fail_during_call)
        start_batch_of(2, scheduler, monkeypatch)
        waiting = scheduler.submit(request(PROMPTS[0], threshold=-math.inf, mode=Mode.WAIT))
        decoding = scheduler.submit(request(PROMPTS[1], max_tokens=400, local_only=True))
        for answer in (decoding, waiting):
            with pytest.raises(RuntimeError, match="no memory"):
                written(answer)


def test_a_prompt_that_cannot_be_kept_fails_alone(
    scheduler: AnswerScheduler, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = scheduler._device.prefix_cache.add
    failures = [MemoryError("no memory")]

    def fail_once(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        add(*arguments)

    monkeypatch.setattr(scheduler._device.prefix_cache, "add", fail_once)
    with pytest.raises(MemoryError):
        written(scheduler.submit(request(PROMPTS[0])))
    assert written(scheduler.submit(request(PROMPTS[0]))) == alone(small, PROMPTS[0])
    assert not scheduler.has_failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_says_so_to_all_answers(
    scheduler: AnswerScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("gone")

    monkeypatch.setattr(scheduler._device, "_take_turn", fail)
    for _ in range(2):
        with pytest.raises(DeviceClosed, match="ended with OSError; restart"):
            written(scheduler.submit(request(PROMPTS[0])))
        assert scheduler.has_failed


def test_closing_ends_all_answers_and_threads(small: SmallModel) -> None:
    before = threading.active_count()
    large = ReleasedLarge(choose, holds=True)
    scheduler = AnswerScheduler(small, large, max_running=3)
    answers = [scheduler.submit(request(prompt, max_tokens=400)) for prompt in PROMPTS]
    answers.append(scheduler.submit(request(PROMPTS[0], threshold=-math.inf)))
    scheduler.close()
    assert all(answer.ended for answer in answers)
    assert threading.active_count() == before
    with pytest.raises(SchedulerClosed):
        scheduler.submit(request(PROMPTS[0]))
    with pytest.raises(SchedulerClosed):
        scheduler.score(PROMPTS[0])


def _alter_near_ties(scheduler: AnswerScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the batch choose the second token where the two best are within `_ROUNDING_NATS`."""
    batch = scheduler._device._batch
    step = batch.step

    def altered(token_ids: Any, **options: Any) -> Any:
        rows = step(token_ids, **options)
        for row, signals in rows.items():
            best, second = signals.top_logprobs[:2]
            if best - second < _ROUNDING_NATS:
                rows[row] = replace(signals, token_id=signals.top_ids[1])
        return rows

    monkeypatch.setattr(batch, "step", altered)
    monkeypatch.setattr(scheduler._device._rounding, "nats", _ROUNDING_NATS)


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
def test_decisions_within_the_rounding_are_made_again_where_asked(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    large = ReleasedLarge(choose)
    expected = [alone(small, p, large=large, threshold=_SOMETIMES, mode="wait") for p in PROMPTS]
    with AnswerScheduler(small, large) as scheduler:
        _alter_near_ties(scheduler, monkeypatch)
        texts = {}
        for exact in (False, True):
            start_batch_of(len(PROMPTS), scheduler, monkeypatch)
            answers = [
                scheduler.submit(request(p, threshold=_SOMETIMES, mode=mode, exact=exact))
                for p in PROMPTS
            ]
            texts[exact] = [written(answer) for answer in answers]
    assert texts[False] != expected
    assert texts[True] == expected
    all_stats = [answer.stats for answer in answers]
    assert sum(stats.redecoded for stats in all_stats if stats is not None) > 0


def test_an_exact_answer_stays_out_of_a_batch_whose_decisions_would_all_be_made_again(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ReleasedLarge(choose)
    answers = [
        generate(
            small.with_own_cache(), large, messages(prompt), router=_budget(), max_tokens=TOKENS
        )
        for prompt in PROMPTS
    ]
    expected = [[token.token_id for token in answer] for answer in answers]
    with AnswerScheduler(small, large) as scheduler:
        monkeypatch.setattr(scheduler._device._rounding, "nats", 0.01)
        with held(scheduler):
            served = [
                scheduler.submit(replace(request(prompt, exact=True), router=_budget()))
                for prompt in PROMPTS
            ]
        assert [written(answer) for answer in served] == expected
        assert scheduler.figures().batched_tokens == 0
    all_stats = [answer.stats for answer in served]
    assert sum(stats.redecoded for stats in all_stats if stats is not None) == 0


def _budget() -> Router:
    return make_router("entropy", budget=0.2)


def _alter_batches(scheduler: AnswerScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the batch always choose the second token."""
    batch = scheduler._device._batch
    step = batch.step

    def altered(token_ids: Any, **options: Any) -> Any:
        signals = step(token_ids, **options)
        return {row: replace(s, token_id=s.top_ids[1]) for row, s in signals.items()}

    monkeypatch.setattr(batch, "step", altered)


def test_no_decision_of_an_exact_answer_is_left_to_a_batch(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnswerScheduler(small, None) as scheduler:
        _alter_batches(scheduler, monkeypatch)
        # Each decision is within the rounding, also the first.
        monkeypatch.setattr(scheduler._device._rounding, "nats", 1e9)
        start_batch_of(len(PROMPTS), scheduler, monkeypatch)
        answers = [scheduler.submit(request(p, exact=True)) for p in PROMPTS]
        assert [written(answer) for answer in answers] == [alone(small, p) for p in PROMPTS]
        assert scheduler.figures().batched_tokens > 0


def test_exact_answers_that_are_sampled_are_in_no_batch(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(small, p, temperature=1.0, top_p=0.95, seed=11) for p in PROMPTS]
    with AnswerScheduler(small, None) as scheduler:
        _alter_batches(scheduler, monkeypatch)
        with held(scheduler):
            answers = [
                scheduler.submit(request(p, exact=True, sampling=_SAMPLING)) for p in PROMPTS
            ]
        assert [written(answer) for answer in answers] == expected


def test_a_token_of_several_ids_counts_as_batched_if_a_batch_fed_its_first(
    scheduler: AnswerScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = scheduler._device
    prompts = [encode_prompt(scheduler._small, prompt) for prompt in PROMPTS[:2]]
    client, other = (device.new_client(prompt, is_exact=True) for prompt in prompts)
    clients = (client, other)
    for begun in clients:
        begun.prefill(begun.prompt.ids, sampling=Sampling(), progress=lambda *_: None)
        device.set_awaited(begun, False)
    step_batch = device._step_batch

    def step_once(*arguments: Any) -> None:
        step_batch(*arguments)
        # As if the other answer had ended.
        device._decoding.discard(other)

    monkeypatch.setattr(device, "_step_batch", step_once)
    batched_before = device.batched_tokens
    client.extend([60, 61])
    assert device.batched_tokens == batched_before + 1
    assert client.was_batched
    client.extend([62])
    assert not client.was_batched
    for begun in clients:
        begun.release()


def test_a_sampler_draws_once_for_a_token_of_several_ids_in_a_batch(
    scheduler: AnswerScheduler, small: SmallModel
) -> None:
    device = scheduler._device
    prompts = [encode_prompt(small, prompt) for prompt in PROMPTS[:2]]
    feeds = [[60, 61, 62], [63], [64, 65], [66]]
    own = small.with_own_cache()
    own.prefill(prompts[0].ids, sampling=_SAMPLING)
    expected = [own.extend(ids).token_id for ids in feeds]
    client, other = (device.new_client(prompt) for prompt in prompts)
    for begun in (client, other):
        begun.prefill(begun.prompt.ids, sampling=_SAMPLING, progress=lambda *_: None)
        device.set_awaited(begun, False)
    assert [client.extend(ids).token_id for ids in feeds] == expected
    assert client.was_batched
    for begun in (client, other):
        begun.release()


def test_a_prompt_does_not_wait_for_long_for_an_answer_that_computes_on_its_own(
    scheduler: AnswerScheduler,
) -> None:
    device = scheduler._device
    prompts = [encode_prompt(scheduler._small, prompt) for prompt in PROMPTS[:2]]
    computing, reading = map(device.new_client, prompts)

    def prefill(client: SmallClient) -> None:
        client.prefill(client.prompt.ids, sampling=Sampling(), progress=lambda *_: None)

    prefill(computing)
    device._prefill_debt_s = 60.0
    thread = threading.Thread(target=prefill, args=(reading,))
    thread.start()
    thread.join(20.0)
    is_read = not thread.is_alive()
    device.set_awaited(computing, False)
    thread.join()
    for client in (computing, reading):
        client.release()
    assert is_read


# Rows of a model with this scaling must have one length.
_DYNAMIC: dict[str, Any] = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


def test_exact_answers_that_cannot_be_batched_compute_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SmallModel(*load(make_tiny_model(tmp_path / "m", extra=_DYNAMIC)), name="m")
    fed: list[int] = []
    plain = DecodedSequence.extend

    def count(self: DecodedSequence, token_ids: Sequence[int]) -> Signals:
        fed.extend(token_ids)
        return plain(self, token_ids)

    monkeypatch.setattr(DecodedSequence, "extend", count)
    with AnswerScheduler(small, None) as scheduler:
        with held(scheduler):
            answers = [scheduler.submit(request(p, exact=True)) for p in PROMPTS]
        assert [written(answer) for answer in answers] == [alone(small, p) for p in PROMPTS]
        assert len(fed) == scheduler.figures().single_tokens


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("gemma3_text", KINDS["gemma3_text"]),
        ("lfm2", KINDS["lfm2"]),
        ("llama", _DYNAMIC),
    ],
)
def test_answers_that_cannot_be_batched_take_turns(
    model_type: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    path = make_tiny_model(tmp_path / "m", model_type=model_type, extra=extra)
    small = SmallModel(*load(path), name="m")
    large = ReleasedLarge(choose)
    expected = [alone(small, p, large=large, threshold=_SOMETIMES, mode="wait") for p in PROMPTS]
    with AnswerScheduler(small, large) as scheduler:
        for _ in range(2):
            with held(scheduler):
                answers = [
                    scheduler.submit(request(p, threshold=_SOMETIMES, mode=Mode.OVERLAP))
                    for p in PROMPTS
                ]
            assert [written(answer) for answer in answers] == expected
        assert scheduler.figures().batched_tokens == 0
        # The prompts were kept whole, and so serve the same prompts only.
        all_stats = [answer.stats for answer in answers]
        assert all(stats is not None and stats.cached_prompt_tokens for stats in all_stats)
