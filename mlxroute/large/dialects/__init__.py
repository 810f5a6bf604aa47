"""How each family of servers is asked for one token, and what its reply means; no I/O."""

from __future__ import annotations

from typing import Final

from mlxroute.large.dialects.base import Dialect, RequestOptions, Streaming
from mlxroute.large.dialects.chat_continuation import ChatContinuation, Continue
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
    ChatContinuation(Continue.FLAGS),
    ChatContinuation(Continue.PREFIX),
    ChatContinuation(Continue.TRAILING, echoes=True),
    ChatContinuation(Continue.TRAILING),
    PlainCompletions(logprobs=False),
    ChatContinuation(Continue.PREFIX, echoes=True, logprobs=False),
    ChatContinuation(Continue.TRAILING, logprobs=False),
)
"""Every dialect, the best rung first; within a rung, native routes first."""


def dialect_named(name: str) -> Dialect | None:
    """The dialect of that name."""
    return next((dialect for dialect in LADDER if dialect.name == name), None)


def reading_ids(dialect: Dialect) -> Dialect:
    """The dialect's most exact form, for when the ids of the large vocabulary can be read."""
    return VllmCompletions(by_id=True) if isinstance(dialect, VllmCompletions) else dialect


__all__ = [
    "LADDER",
    "Dialect",
    "RequestOptions",
    "Streaming",
    "dialect_named",
    "reading_ids",
]
