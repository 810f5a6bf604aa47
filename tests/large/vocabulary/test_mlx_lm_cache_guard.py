"""No request may equal a sequence that `mlx_lm.server` has cached: that would crash it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.large.vocabulary.mlx_lm_cache_guard import MlxLmCacheGuard, Usage
from mlxroute.sequences import common_prefix_length
from tests.support.vocabularies import TableVocabulary, context

# No piece is a prefix of another: a text has one tokenisation. "Ã" and "©" are the halves of "é".
PIECES = ["a", "b", "Ġc", "dd", "Ã", "©"]
VOCABULARY = TableVocabulary(PIECES)
IDS = [VOCABULARY.id_of(piece) for piece in PIECES]
OPEN_HALF, CLOSING_HALF = IDS[4:]
PROMPTS = [(IDS[0], IDS[2]), (IDS[0], IDS[2], IDS[0]), (IDS[3],)]

Ids = tuple[int, ...]


@dataclass
class Server:
    """A model of `mlx_lm.server`: what it has cached, and when it crashes."""

    seed: int
    trims: bool
    cached: set[Ids] = field(default_factory=set)
    generated: int = 0

    def greedy(self, ids: Ids) -> int:
        if ids and ids[-1] == OPEN_HALF:
            return CLOSING_HALF
        return IDS[hash((self.seed, ids)) % 5]

    def reusable(self, prompt: Ids) -> int:
        """Return how many of a prompt's tokens come from the cache."""
        if self.trims:
            shared = max((common_prefix_length(other, prompt) for other in self.cached), default=0)
            return min(shared, len(prompt) - 1)
        return max(
            (len(other) for other in self.cached if prompt[: len(other)] == other), default=0
        )

    def complete(self, prompt: Ids, count: int) -> Ids:
        assert prompt not in self.cached, "the generation thread is dead"
        self.generated += count
        ids = prompt
        for _ in range(count):
            ids = (*ids, self.greedy(ids))
        if self.trims:
            self.cached = {other for other in self.cached if ids[: len(other)] != other}
        self.cached.add(ids)
        return ids[len(prompt) :]


def escalate(server: Server, guard: MlxLmCacheGuard, path: Ids, *, lost: bool) -> int | None:
    """Ask for the token after `path` as the client does; None if the reply leaves the path."""
    fragment = path[-1:] if path[-1] == OPEN_HALF else ()
    text = b"".join(map(VOCABULARY.token_bytes, path[: len(path) - len(fragment)])).decode()
    position_context = context(
        text, VOCABULARY, answer=path[: len(path) - len(fragment)], fragment_ids=fragment
    )
    prompt, repeated = guard.plan(text, context=position_context)
    repeated = (*repeated, *map(VOCABULARY.token_bytes, fragment))
    assert prompt.encode() + b"".join(repeated) == b"".join(map(VOCABULARY.token_bytes, path))
    count = len(repeated) + 2
    guard.record_request(prompt, max_tokens=count)
    ids = VOCABULARY.encode(prompt)
    usage = Usage(prompt=len(ids), cached=server.reusable(ids))
    reply = server.complete(ids, count)
    if lost:
        return None
    data = [VOCABULARY.token_bytes(token_id) for token_id in reply]
    guard.record_reply(prompt, data, usage=usage)
    return reply[len(repeated)] if data[: len(repeated)] == list(repeated) else None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["escalate", "escalate", "lost", "agree", "agree", "own", "restart"]),
        st.integers(0, 4),
    ),
    max_size=60,
)


@given(steps=STEPS, seed=st.integers(0, 50), trims=st.booleans(), loses=st.booleans())
@settings(max_examples=400, deadline=None)
def test_no_prompt_equals_a_cached_sequence_and_every_answer_is_the_greedy_one(
    steps: list[tuple[str, int]], seed: int, trims: bool, loses: bool
) -> None:
    server, guard = Server(seed, trims), MlxLmCacheGuard()
    path = PROMPTS[0]
    for step, choice in steps:
        if step == "restart":
            path = PROMPTS[choice % len(PROMPTS)]
        elif step == "own" and path[-1] != OPEN_HALF:
            path = (*path, IDS[choice])
        elif step in ("escalate", "lost"):
            lost = loses and step == "lost"
            token_id = escalate(server, guard, path, lost=lost)
            # There is no answer only inside a character that the large model would not begin, and
            # where the small model did not continue with the lost reply.
            begun = path[-1] != OPEN_HALF or server.greedy(path[:-1]) == OPEN_HALF
            assert loses or not begun or token_id == server.greedy(path)
            path = (*path, token_id if token_id is not None else server.greedy(path))
        else:
            path = (*path, server.greedy(path))


def test_calls_at_every_position_cost_two_tokens_each_if_caches_can_be_trimmed() -> None:
    server, guard = Server(seed=1, trims=True), MlxLmCacheGuard()
    path: Ids = PROMPTS[0]
    for _ in range(50):
        token_id = escalate(server, guard, path, lost=False)
        assert token_id is not None
        path = (*path, token_id)
    # One more inside a character, and one before the guard knows that caches are trimmed.
    assert server.generated <= 3 * 50


def test_a_refused_request_is_not_avoided_later() -> None:
    guard = MlxLmCacheGuard()
    guard.record_request("a", max_tokens=2)
    guard.record_refusal("a", max_tokens=2)
    assert guard.plan("aa", context=context("aa", VOCABULARY, answer=(IDS[0], IDS[0]))) == (
        "aa",
        (),
    )


def test_the_same_prompt_asked_again_is_sent_unchanged() -> None:
    guard = MlxLmCacheGuard()
    guard.record_request("a", max_tokens=2)
    guard.record_reply("a", [b"b", b"dd"])
    position_context = context("a", VOCABULARY, answer=(IDS[0],))
    assert guard.plan("a", context=position_context) == ("a", ())
    assert guard.plan("abdd", context=position_context) == ("ab", (b"dd",))


def test_a_token_without_bytes_does_not_make_the_plan_loop() -> None:
    guard = MlxLmCacheGuard()
    guard.record_request("a", max_tokens=2)
    guard.record_reply("a", [b"b", b""])
    prompt, repeated = guard.plan("ab", context=context("ab", VOCABULARY, answer=(IDS[0], IDS[1])))
    assert prompt.encode() + b"".join(repeated) == b"ab"


def test_a_lost_reply_is_avoided_even_if_the_small_vocabulary_has_shorter_tokens() -> None:
    guard = MlxLmCacheGuard()
    guard.record_request("a", max_tokens=2)
    fine = TableVocabulary(["a", "d", "y"])
    position_context = context("addydy", fine, answer=fine.encode("addydy"))
    prompt, repeated = guard.plan("addydy", context=position_context)
    assert (prompt, b"".join(repeated)) == ("a", b"ddydy")


def test_two_requests_of_one_prompt_may_be_in_flight() -> None:
    guard = MlxLmCacheGuard()
    for _ in range(2):
        guard.record_request("ab", max_tokens=2)
    for _ in range(2):
        guard.record_reply("ab", [b"a", b" c"])
    assert guard.plan("aba c", context=None) == ("aba", (b" c",))


def test_a_refusal_after_the_reply_to_the_same_prompt_changes_nothing() -> None:
    guard = MlxLmCacheGuard()
    for _ in range(2):
        guard.record_request("ab", max_tokens=2)
    guard.record_reply("ab", [b"a", b" c"])
    guard.record_refusal("ab", max_tokens=2)
    assert guard.plan("aba c", context=None) == ("aba", (b" c",))
