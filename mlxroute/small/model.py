"""The small model: load, prefill, decode step, rollback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.errors import UsageError
from mlxroute.small.batch import Batch
from mlxroute.small.batch_cost import measure
from mlxroute.small.continuations import continue_greedily
from mlxroute.small.decoder import Decoder, Head, ScoredText
from mlxroute.small.kernels import select_kernel
from mlxroute.small.kv_cache import CacheCopy
from mlxroute.small.mlp_head import MlpHead
from mlxroute.tokenizers.chat_template import ChatTokenizer
from mlxroute.types import (
    BranchCost,
    Message,
    Notify,
    Progress,
    Sampling,
    Signals,
    no_notice,
    no_progress,
)

if TYPE_CHECKING:
    import mlx.core as mx

# As `mlx_lm.generate_step`, so that the same prompt rounds the same way.
PREFILL_STEP_SIZE = 2048
_DEFAULT_CONTEXT = 4096
_CONTEXT_KEY = "max_position_embeddings"


class SmallModel:
    """A model that `mlx_lm` loads, with its KV cache, decoding one position at a time.

    `model` and `tokenizer` are the `mlx_lm` objects. Not safe for use from several threads.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        kernel: str = "auto",
        notify: Notify = no_notice,
    ) -> None:
        """`kernel` is auto, metal or graph. Raises UsageError where there is no such kernel."""
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._text = ChatTokenizer(tokenizer, name=name)
        self.vocabulary = self._text.vocabulary
        self.context_length = _context_length(model)
        self.head: MlpHead | None = None
        self._decoder = Decoder(model, kernel=select_kernel(kernel, notify=notify))

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        adapter: Path | None = None,
        cache_dir: Path | None = None,
        offline: bool = False,
        kernel: str = "auto",
        progress: Progress = no_progress,
        notify: Notify = no_notice,
    ) -> SmallModel:
        """Load a catalogue name, a model directory, a GGUF file or a hub id.

        Fetches what is not cached. Raises CatalogError, WeightsError, NotEnoughSpace, UsageError.
        """
        from mlxroute.backend import blas
        from mlxroute.catalog import Catalog
        from mlxroute.config import user_catalog_dir
        from mlxroute.weights import default_cache_dir, resolve

        cache_dir = cache_dir or default_cache_dir()
        local = resolve(
            str(spec),
            catalog=Catalog.load(user_catalog_dir()),
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
            notify=notify,
        )
        blas_line = blas.interpose(cache_dir)

        from mlxroute.backend.load import check_memory, load, on_cpu

        if blas_line and on_cpu():
            notify(blas_line)
        check_memory(local.path, role="small")
        model, tokenizer = load(local.path, adapter=adapter)
        return cls(model, tokenizer, name=local.name, kernel=kernel, notify=notify)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        Raises UsageError when the chat template refuses the conversation.
        """
        return self._text.render(messages)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt; special tokens in it are parsed, a missing BOS is added."""
        return self._text.encode_prompt(text)

    @property
    def cached_ids(self) -> Sequence[int]:
        """The ids in the KV cache, without the rows of a batch; changes with the next step."""
        return self._decoder.cache.token_ids

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        """For each row of a batch, the ids it holds beyond `cached_ids`; empty without a batch."""
        return self._decoder.cache.tails

    def prefill(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        progress: Progress = no_progress,
    ) -> tuple[Signals, int]:
        """Run the prompt and return the first position's signals and how many ids were reused.

        Whatever the cache shares with the prompt stays; the rest runs in chunks, all but the
        last id, which seeds the first decode step.
        """
        if not prompt_ids:
            raise UsageError("the prompt is empty")
        reused = self._decoder.begin(prompt_ids, sampling or Sampling())
        total = len(prompt_ids)
        done = reused
        progress("prompt", done, total)
        while total - done > 1:
            chunk = prompt_ids[done : min(done + PREFILL_STEP_SIZE, total - 1)]
            self._decoder.feed(chunk)
            done += len(chunk)
            progress("prompt", done, total)
        signals = self.step(prompt_ids[-1])
        progress("prompt", total, total)
        return signals, reused

    def step(self, token_id: int) -> Signals:
        """Feed one committed token; return the signals of the position after it."""
        return self.extend((token_id,))

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed committed tokens in one pass; return the signals of the position after the last.

        The next position is queued meanwhile; committing this one's own token finds it under way.
        """
        return self._decoder.step(token_ids)

    def score_text(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> ScoredText:
        """What the model sees at each position of an answer that another wrote.

        Raises UsageError for an architecture whose final norm is not known.
        """
        self._decoder.check_hidden()
        reused = self._decoder.begin(prompt_ids, Sampling())
        if len(prompt_ids) - 1 > reused:
            self._decoder.feed(prompt_ids[reused:-1])
        return self._decoder.read((prompt_ids[-1], *answer_ids[:-1]), answer_ids)

    def prefill_copy(self, prompt_ids: Sequence[int]) -> tuple[Signals, CacheCopy]:
        """Run a prompt for a row of a batch: the first position's signals, and the cache behind it.

        Whatever the cache shares with the prompt is used. Raises UsageError as `copy_cache` does.
        """
        reused = self._decoder.begin(prompt_ids, Sampling())
        while len(prompt_ids) - reused > PREFILL_STEP_SIZE:
            self._decoder.feed(prompt_ids[reused : reused + PREFILL_STEP_SIZE])
            reused += PREFILL_STEP_SIZE
        signals = self._decoder.run(prompt_ids[reused:])
        return signals, self.copy_cache(len(prompt_ids))

    def copy_cache(self, count: int) -> CacheCopy:
        """A copy of the KV cache's first `count` tokens. Raises UsageError where there is none."""
        return self._decoder.cache.copy(count)

    def start_batch(self, copies: Sequence[CacheCopy]) -> Batch:
        """Decode several sequences together from their held caches on."""
        return Batch(copies, self._decoder.signals)

    def continue_greedily(
        self, starts: Sequence[tuple[CacheCopy, int]], *, max_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continue several sequences greedily in one batch.

        Each start is a copy of the KV cache and the token that follows it. Returns the ids after
        that token, at most `max_tokens[i]` of them, without the end token. Rows of a batch round
        differently from a single row.
        """
        return continue_greedily(
            self.model, starts, max_tokens=max_tokens, eos_ids=self.vocabulary.eos_ids
        )

    def can_rollback(self, count: int) -> bool:
        """Whether `count` tokens that are fed next could be taken back.

        Some caches never can; one with a sliding window no longer once that is full.
        """
        return self._decoder.cache.could_give_back(count)

    @property
    def max_rows(self) -> int:
        """How many rows `branch` may have now: fewer behind a long text, 1 where it cannot run."""
        return self._decoder.cache.max_rows

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """What a step of `rows` rows costs beside one of one row, measured in a few steps.

        `token_id` is to be the next token; the cache is left as it was.
        """
        return measure(self._decoder, token_id, rows=rows)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token to each row of a batch; return the signals of the position after it.

        Row i continues what row `parents[i]` of the batch before holds, at first the sequence
        alone (row 0). Rows of a batch round differently from one row. `select` ends the batch.
        """
        return self._decoder.branch(parents, token_ids)

    def select(self, row: int) -> None:
        """Go on with one row of the batch alone; nothing happens without a batch."""
        self._decoder.select(row)

    def rollback(self, count: int) -> None:
        """Take the last `count` fed tokens back. Raises RollbackError."""
        self._decoder.rollback(count)

    def hidden_state(self) -> mx.array:
        """Final-norm output at the last fed position, [hidden size], in the model's dtype.

        Raises RollbackError before the first step or after a rollback, UsageError for an
        architecture whose final norm is not known.
        """
        return self._decoder.hidden_state()

    def load_head(self, path: Path) -> tuple[float, ...]:
        """Evaluate the head of a file from now on; return its scores at evenly spaced ranks.

        Raises WeightsError for a file that is no head for this model, UsageError for an
        architecture whose final norm is not known.
        """
        args = getattr(self.model, "args", None)
        text = getattr(args, "text_config", None) or {}
        size = getattr(args, "hidden_size", None) or text.get("hidden_size") or 0
        self.head = MlpHead.load(path, hidden_size=int(size))
        self.set_head(self.head)
        return self.head.quantiles

    def set_head(self, head: Head | None) -> None:
        """Evaluate a learned head in every step's graph; its score is in the signals."""
        self._decoder.set_head(head)


def _context_length(model: Any) -> int:
    for holder in (model, getattr(model, "language_model", None)):
        args = getattr(holder, "args", None)
        text = getattr(args, "text_config", None) or {}
        for value in (getattr(args, _CONTEXT_KEY, None), text.get(_CONTEXT_KEY)):
            if value:
                return int(value)
    return _DEFAULT_CONTEXT
