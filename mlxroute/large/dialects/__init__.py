"""Dialects: the JSON of each server family's requests and replies, without any I/O."""

from __future__ import annotations

from typing import Final

from mlxroute.large.dialects.base import (
    TEXT_ONLY_RUNG,
    Dialect,
    RequestOptions,
    StreamingDialect,
)
from mlxroute.large.dialects.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.completions import PlainCompletions
from mlxroute.large.dialects.llama_server import LlamaServer
from mlxroute.large.dialects.mlx_lm import MlxLm
from mlxroute.large.dialects.ollama import OllamaGenerate
from mlxroute.large.dialects.sglang import SglangGenerate
from mlxroute.large.dialects.tgi import TgiGenerate
from mlxroute.large.dialects.vllm import VllmCompletions

LADDER: Final[tuple[Dialect, ...]] = (
    LlamaServer(),
    VllmCompletions(by_id=False),
    SglangGenerate(),
    TgiGenerate(),
    MlxLm(),
    OllamaGenerate(),
    PlainCompletions(logprobs=True),
    ChatContinuation(ContinuationMethod.FLAGS),
    ChatContinuation(ContinuationMethod.PREFIX),
    ChatContinuation(ContinuationMethod.TRAILING, echoes=True),
    ChatContinuation(ContinuationMethod.TRAILING),
    PlainCompletions(logprobs=False),
    ChatContinuation(ContinuationMethod.PREFIX, echoes=True, logprobs=False),
    ChatContinuation(ContinuationMethod.TRAILING, logprobs=False),
)
"""Every dialect, the best rung first; within a rung, native routes first."""


def dialect_named(name: str) -> Dialect | None:
    """Return the dialect of that name, or None."""
    return next((dialect for dialect in LADDER if dialect.name == name), None)


def with_ids(dialect: Dialect) -> Dialect:
    """Return the variant of a dialect that names alternatives by id, where there is one.

    It is for callers that know the large vocabulary and can look the ids up.
    """
    return VllmCompletions(by_id=True) if isinstance(dialect, VllmCompletions) else dialect


__all__ = [
    "LADDER",
    "TEXT_ONLY_RUNG",
    "Dialect",
    "RequestOptions",
    "StreamingDialect",
    "dialect_named",
    "with_ids",
]
