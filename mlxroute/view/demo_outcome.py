"""The demo's answers in words: a line for each, how they came out, and the routed one's figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxroute.types import RunStats, StopReason
from mlxroute.view.figures import (
    describe_answer_uploads,
    format_count,
    format_number,
    format_percent,
    format_seconds,
)

# Whether the answers by the small model, by both and by the large model are right.
_CHOSEN_OUTCOME = (False, True, True)


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One of the demo's answers.

    Args:
        writer: Who wrote it, as the subject of a sentence.
        stats: Its figures.
        is_judged: Whether there are accepted answers to the question.
        is_right: Whether it is right; None if it has no conclusion.
        conclusion: What it concludes; None if it has no conclusion.
        failure: Why the large model did not write it to the end; None if it did.
    """

    writer: str
    stats: RunStats
    is_judged: bool
    is_right: bool | None
    conclusion: str | None
    failure: str | None = None

    @property
    def verdict(self) -> str:
        """One word for the result; empty if the answer is not judged."""
        if self.failure is not None:
            return "failed"
        if not self.is_judged:
            return ""
        return {True: "right", False: "wrong", None: "unclear"}[self.is_right]


def result_line(answer: DemoAnswer) -> str:
    """Return one line about a finished answer: verdict, time, tokens and uploads."""
    stats = answer.stats
    parts = [f"{format_count(stats.tokens, 'token')} in {format_seconds(stats.total_s)}"]
    if stats.tokens_per_s:
        parts[0] += f" ({format_number(stats.tokens_per_s)} tok/s)"
    if 0 < stats.large_tokens < stats.tokens:
        share = format_percent(stats.large_tokens / stats.tokens)
        parts.append(f"{stats.large_tokens:,} by the large model ({share})")
    parts.append(describe_answer_uploads(stats) if stats.requests else "nothing uploaded")
    if stats.finish_reason is StopReason.LENGTH:
        parts.append("ended by the token limit")
    if answer.verdict:
        reason = answer.failure or answer.conclusion
        parts.insert(0, f"{answer.verdict}: {reason}" if reason else answer.verdict)
    return " · ".join(parts)


def describe_outcome(
    small: DemoAnswer, routed: DemoAnswer, large: DemoAnswer, *, is_measured_pair: bool
) -> str:
    """Return what the three answers show; an empty text if they are not judged.

    Args:
        small: The answer of the small model alone.
        routed: The answer of both.
        large: The answer of the large model alone.
        is_measured_pair: Whether the question was chosen with these two models.
    """
    answers = (small, routed, large)
    if not routed.is_judged:
        return ""
    if tuple(answer.is_right for answer in answers) == _CHOSEN_OUTCOME:
        sentence = (
            f"{small.writer} was wrong. With {routed.stats.large_tokens:,} of"
            f" {format_count(routed.stats.tokens, 'token')} from the large model the answer"
            f" became right. {large.writer} was right too, with all"
            f" {format_count(large.stats.tokens, 'token')} its own."
        )
    else:
        sentence = " ".join(f"{answer.writer}: {answer.verdict}." for answer in answers)
        sentence += (
            " The question was chosen because the first answer is wrong and the others are right;"
            " here it came out otherwise."
        )
        if is_measured_pair:
            sentence += (
                " Where two tokens are almost equally likely, another processor or another"
                " version of a server may choose the other one."
            )
        else:
            sentence += " It was chosen with other models."
    return f"{sentence} {_compare_times(routed, large)}".strip()


def describe_choice(
    *,
    pair: str,
    candidates: int,
    small_wrong: int,
    corrected: int,
    small_right: int,
    spoiled: int,
) -> str:
    """Return how the question was chosen: from how many, and what routing did there."""
    return (
        f"The question was chosen because it shows the effect: of {candidates:,} tried with {pair},"
        f" routing corrected {corrected:,} of the small model's {small_wrong:,} wrong answers, and"
        f" made {spoiled:,} of its {small_right:,} right ones wrong or unclear."
    )


def _compare_times(routed: DemoAnswer, large: DemoAnswer) -> str:
    """Return the speeds of the routed answer and of the large model alone."""
    speeds = (routed.stats.tokens_per_s, large.stats.tokens_per_s)
    if not all(speeds) or large.failure is not None:
        return ""
    ratio = speeds[0] / speeds[1]
    if ratio >= 1:
        return f"The routed answer was written {ratio:.1f} times as fast as the large model's own."
    return (
        "On this machine the large model alone wrote faster; routing pays where the large model is"
        " slower or far away."
    )


def closing_paragraph(
    stats: RunStats, *, small: str, large: str, threshold: float, allowance: str | None = None
) -> str:
    """Return the demo's last paragraph: what its answer showed, and what to try next.

    Args:
        stats: Figures of the answer.
        small: Name of the small model.
        large: Name of the large model.
        threshold: Threshold of the router in nats.
        allowance: The budget in words. None (default) if there is only a threshold.
    """
    small_tokens = stats.tokens - stats.large_tokens
    tokens = format_count(stats.tokens, "token")
    uncertainty = _describe_uncertainty(threshold, allowance)
    sentences = [f"{small} wrote {small_tokens:,} of the {tokens} on this machine."]
    if stats.escalated:
        share = format_percent(stats.escalation_rate)
        stall, total = format_seconds(stats.stall_s), format_seconds(stats.total_s)
        sentences += [
            f"{large} was asked for one token wherever {uncertainty}: "
            f"{format_count(stats.escalated, 'time')}, at {share} of the positions. Those "
            f"tokens are underlined; {stats.agreed:,} of them {small} would have written, too.",
            f"{stall} of {total} went into waiting for it; {describe_answer_uploads(stats)}.",
        ]
    elif not stats.unchecked:
        sentences.append(f"{large} was not asked: there was no position where {uncertainty}.")
    if failed := stats.unchecked - stats.withheld:
        sentences.append(
            f"{format_count(failed, 'position')} should have been checked with {large}, which "
            "did not answer."
        )
    if stats.withheld:
        sentences.append(f"{format_count(stats.withheld, 'position')} kept local by --never-send.")
    return " ".join(sentences)


def _describe_uncertainty(threshold: float, allowance: str | None) -> str:
    """Return a clause that describes the escalated positions."""
    if allowance is not None:
        return f"the small model was least sure, within {allowance}"
    if threshold == -math.inf:
        return "there was a token to write"
    return f"the small model's entropy passed {threshold:g} nats"
