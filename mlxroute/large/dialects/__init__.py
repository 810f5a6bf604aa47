"""Dialects: the JSON of each server family's requests and replies, without any I/O."""

from __future__ import annotations

from typing import Final

from mlxroute.large.dialects.base import Dialect, RequestOptions, StreamingDialect
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.chat.example_completion import ExampleCompletion
from mlxroute.large.dialects.chat.fielded_dialect import FieldedDialect
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
    ExampleCompletion(),
)
"""Every dialect, the best rung first; within a rung, native routes first."""


def get_dialect(name: str) -> Dialect | None:
    """Return the dialect of this name; None if there is none."""
    for dialect in LADDER:
        if dialect.name == name:
            return dialect
        if isinstance(dialect, FieldedDialect) and (changed := dialect.named(name)) is not None:
            return changed
    return None


def prefer_ids(dialect: Dialect) -> Dialect:
    """Return the variant of a dialect that names alternatives by id, or else the dialect.

    It is for callers that know the large vocabulary and can look up the ids.
    """
    return VllmCompletions(by_id=True) if isinstance(dialect, VllmCompletions) else dialect


__all__ = [
    "LADDER",
    "Dialect",
    "FieldedDialect",
    "RequestOptions",
    "StreamingDialect",
    "get_dialect",
    "prefer_ids",
]
