"""What the answers of a session are made from, for their documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxroute.cli.small_setup import default_small
from mlxroute.config import Settings
from mlxroute.routers import Router
from mlxroute.types import Message, Mode

if TYPE_CHECKING:
    from mlxroute.answers.recorded_answer import AnswerOrigin
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel


def make_origin(
    messages: Sequence[Message],
    small: SmallModel,
    large: LargeModel | None,
    router: Router,
    settings: Settings,
    *,
    mode: str,
    call_ceiling: float | None,
    never_send: int,
) -> AnswerOrigin:
    """Return what the next answer to a conversation is made from.

    `never_send` is the number of patterns; the other arguments are those of the answer.
    """
    from mlxroute.answers.document import ModelPair, OptionsRecord
    from mlxroute.answers.recorded_answer import AnswerOrigin
    from mlxroute.answers.router_record import record_router

    models = ModelPair(
        small=small.name,
        small_spec=settings.small or default_small(),
        adapter=settings.adapter,
        large=None if large is None else large.model_name,
        large_url=None if large is None else large.base_url,
    )
    options = OptionsRecord(
        mode=Mode(mode),
        prefetch=settings.prefetch,
        call_ceiling=call_ceiling,
        accept_within=settings.accept_within,
        max_tokens=settings.max_tokens,
        stop=settings.stop,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        never_send=never_send,
    )
    return AnswerOrigin(list(messages), small.vocabulary, models, record_router(router), options)
