"""Clients connected to a scripted server, single calls of them, and replies for the script."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxroute.large import LargeModel
from mlxroute.large.dialects import get_dialect
from mlxroute.large.negotiation.verdict_file import Verdict, VerdictFile
from mlxroute.large.vocabulary.token_sources import FileTokenSource, Tokenizer
from mlxroute.types import LargeToken
from tests.support.loopback import Loopback, Reply, mlx_lm_reply
from tests.support.vocabularies import TableVocabulary, context

VOCABULARY = TableVocabulary(["a", "b", "Ġthe", "Ġ", "t", "h", "e", "zz", "Ã", "©"])
THE = VOCABULARY.id_of("Ġthe")
PLAIN = "OpenAI completions"
MLX_LM = "mlx_lm completions"


def legacy(text: str, /, **changes: Any) -> dict[str, Any]:
    """Return a reply in the format of vLLM and of OpenAI's legacy models."""
    logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5, "a": -2}]}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs} | changes
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def content_reply(token: dict[str, Any] | None, /, **changes: Any) -> dict[str, Any]:
    """Return a reply with `logprobs.content`, the format of OpenAI's chats."""
    text = "" if token is None else token["token"]
    logprobs = None if token is None else {"content": [token]}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs} | changes
    return {"choices": [choice]}


def save_verdict(
    path: Path,
    *,
    url: str,
    model: str | None,
    dialect: str,
    token_source: str | None = None,
) -> None:
    """Write the verdict file of an earlier probe."""
    probed = get_dialect(dialect)
    assert probed is not None
    verdict = Verdict(
        base_url=url,
        model=model,
        dialect=probed.name,
        rung=probed.rung,
        checks=(),
        rejected=(),
        token_source=token_source,
        context_length=None,
        latency_p50_s=0.0,
        latency_p95_s=0.0,
        requests=1,
    )
    VerdictFile(path).save(verdict, model=model)


@contextlib.contextmanager
def connected_client(
    server: Loopback,
    dialect: str,
    *,
    model: str | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Iterator[LargeModel]:
    """A client that has connected by the verdict of an earlier probe.

    `tokenizer` is the large model's, for a client that names the `model`.
    """
    no_route = Reply.of({"error": "Not Found"}, status=404)
    fits = mlx_lm_reply([(9, "apple"), (2, "a")]) if dialect == MLX_LM else Reply.of(legacy("app"))
    routes = [] if tokenizer else [no_route, no_route]
    server.script.extend([Reply.of({"data": []}), *routes, fits])
    with tempfile.TemporaryDirectory() as folder:
        verdicts = Path(folder) / "verdicts.json"
        source = FileTokenSource.name if tokenizer else None
        save_verdict(verdicts, url=server.url, model=model, dialect=dialect, token_source=source)
        options |= {"verdicts": verdicts, "find_tokenizer": lambda name: tokenizer}
        with LargeModel(server.url, model=model, **options) as large:
            large.connect()
            assert not server.script
            yield large


def ask_plain(
    server: Loopback, *replies: Reply | dict[str, Any], text: str = "x", **options: Any
) -> LargeToken:
    """Return the token of one call to a plain server, after a connection."""
    with connected_client(server, PLAIN, model="m", **options) as large:
        server.script.extend(
            reply if isinstance(reply, Reply) else Reply.of(reply) for reply in replies
        )
        return large.next_token(context(text, VOCABULARY))


def ask_mlx(
    server: Loopback, *replies: Reply, text: str = "x", vocabulary: TableVocabulary = VOCABULARY
) -> LargeToken:
    """Return the token of one call to an mlx_lm server, after a connection."""
    with connected_client(server, MLX_LM) as large:
        server.script.extend(replies)
        return large.next_token(context(text, vocabulary))
