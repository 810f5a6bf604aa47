"""`generate`: the call that gives one routed answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from mlxroute.engine.answer import Answer
from mlxroute.engine.experience import Experience
from mlxroute.engine.options import Options, check_kinds
from mlxroute.engine.protocols import LargeProtocol, RouterProtocol, SmallProtocol
from mlxroute.errors import UsageError
from mlxroute.types import Message, Mode, OnFailure, Prices, Sampling, ignore_failure


def generate(  # noqa: PLR0913 - the options of the command line, by the same names
    small: SmallProtocol,
    large: LargeProtocol | None,
    messages: Sequence[Message] | str,
    *,
    router: RouterProtocol,
    max_tokens: int = 512,
    stop: Sequence[str] | str = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    timeout_s: float = 30.0,
    strict: bool = False,
    never_send: Sequence[re.Pattern[str]] = (),
    prices: Prices | None = None,
    mode: Mode | str = Mode.AUTO,
    prefetch: int | None = None,
    call_ceiling: float | None = None,
    accept_within: float = 0.0,
    experience: Experience | None = None,
    on_failure: OnFailure = ignore_failure,
) -> Answer:
    """Answer a conversation with the small model, escalating where the router decides so.

    Iterate over the result to decode it. An escalated position takes the large model's most likely
    token. `mode`, `prefetch`, `call_ceiling` and `experience` change time and calls, not the text,
    given the same replies of the server.

    Args:
        small: The small model.
        large: The large model; None to answer with the small model alone.
        messages: The conversation, or the text of one user message.
        router: Scores each position, and decides by a threshold or a budget.
        max_tokens: Maximum length of the answer, in tokens; 512 by default.
        stop: Texts, or one text, before which the answer ends; none by default.
        temperature: Temperature of the small model's own tokens; below 0.001 they are greedy. 0 by
            default.
        top_p: Nucleus sampling of the small model's own tokens, above 0 and at most 1, the default;
            below 0.001 they are greedy.
        top_k: Number of the likeliest tokens that the small model's own are drawn from; 1 is
            greedy, and 0, the default, sets no limit.
        min_p: Probability of the small model's own tokens, as a share of the likeliest one's, below
            which none is drawn; 1 is greedy. 0 by default.
        seed: Makes sampling repeatable; None, the default, does not.
        timeout_s: Time limit in seconds of each call, and of all waiting for failed calls in the
            answer; 30 by default.
        strict: Raise the first LargeError while iterating; by default the small model's token stays
            and is marked as unchecked.
        never_send: Patterns of text that must stay on this machine. Once one matches the context,
            no later position is escalated. None by default.
        prices: Prices for the cost estimate in `stats()`; None, the default, gives none.
        mode: What to do while a call is in flight: `wait`, `overlap`, `hedge`, or `auto`, the
            default, which picks among them.
        prefetch: Tokens that each call returns beyond the one it is made for, 0 to 64; None, the
            default, leaves it to the mode.
        call_ceiling: Maximum average number of calls per escalated position, at least 1, over all
            answers with the same `experience`; None, the default, sets no limit.
        accept_within: Nats by which the small model's token may be less likely to the large model
            than the large model's own and still be kept, at an escalated position, unless it ends
            the answer; 0, the default, always takes the large model's.
        experience: Measurements of the pair from earlier answers, which this one adds to; a new
            object by default.
        on_failure: Called with the first failure of each kind, while the answer goes on; by default
            failures are only counted. `stats().failures` has them all.

    Raises:
        UsageError: The prompt is empty, or a value is out of range or of another form.
        ContextTooLong: The prompt does not fit in the small model's context.
    """
    check_kinds(
        small=small, large=large, router=router, experience=experience, on_failure=on_failure
    )
    if isinstance(messages, str):
        if not messages.strip():
            raise UsageError("the prompt is empty")
        messages = [{"role": "user", "content": messages}]
    # Options checks these values, and brings stop, never_send and mode into its own form.
    options = Options(
        max_tokens=max_tokens,
        stop=cast(tuple[str, ...], stop),
        sampling=Sampling(temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed),
        timeout_s=timeout_s,
        strict=strict,
        never_send=cast(tuple[re.Pattern[str], ...], never_send),
        prices=prices,
        mode=cast(Mode, mode),
        prefetch=prefetch,
        call_ceiling=call_ceiling,
        accept_within=accept_within,
    )
    return Answer(
        small,
        large,
        messages,
        router=router,
        options=options,
        experience=experience,
        on_failure=on_failure,
    )
