"""`SmallModel`: loading, prefill, decode steps, batches and rollback of the small model."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.backend import blas
from mlxroute.backend.adapter_folder import adapted_name
from mlxroute.catalog import Catalog
from mlxroute.config import user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.small.batch_cost import measure_branch_cost
from mlxroute.small.memory_check import make_size_check
from mlxroute.small.model_args import find_context_length
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer
from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    Message,
    Notify,
    Progress,
    Sampling,
    Signals,
    no_notice,
    no_progress,
)
from mlxroute.user_folders import cache_folder, check_temporary_folder
from mlxroute.weights import accept_any_size, resolve

if TYPE_CHECKING:
    from mlxroute.small.decoder import Decoder, Head, ScoredText
    from mlxroute.small.kv_cache import CacheLayers
    from mlxroute.small.mlp_head import MlpHead

# As `mlx_lm.generate_step`, so that the same prompt rounds the same way.
PREFILL_STEP_SIZE = 2048


class SmallModel:
    """A model that `mlx_lm` loads, with its KV cache, decoding one position at a time.

    `SmallModel.load` builds one from a name or a path; the constructor takes a model that is
    loaded already. One thread may use it at a time.

    Args:
        model: The `mlx_lm` model (an `mlx.nn.Module`).
        tokenizer: The `mlx_lm` tokenizer (a `TokenizerWrapper`), or a `FastTokenizer`.
        name: The name of the model in results and messages. Score ranks and learned heads are
            looked up by it, so a catalogue model should keep its catalogue name.
        kernel: What computes the signals from the logits: `metal`, the fused Metal kernel; `graph`,
            the same from MLX operations, on any device; `auto`, Metal where it works. Default:
            `auto`.
        notify: Receives a warning if `auto` cannot use the Metal kernel on a Metal GPU. Default:
            ignored.

    Attributes:
        model: As given.
        name: As given. With an adapter, `load` adds a fingerprint of it.
        plain_name: The name without an adapter.
        fingerprint: Differs between contents of the files of `plain_name`, as `load` found them.
            Empty for a model of the package index, and from the constructor.
        vocabulary: The tokenizer's vocabulary.
        context_length: Maximum total number of tokens of prompt and answer.
        head: The learned head that `load_head` read; None without one.

    Raises:
        UsageError: The kernel is unknown, or it is `metal` and does not work here.
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
        # It imports MLX, which must follow the BLAS that `load` opens.
        from mlxroute.small.decoder import Decoder

        self.model = model
        self.name = self.plain_name = name
        self.fingerprint = ""
        self._tokenizer = tokenizer
        self._chat_tokenizer = ChatTokenizer(tokenizer, name=name)
        self.vocabulary = self._chat_tokenizer.vocabulary
        self.head: MlpHead | None = None
        self._decoder = Decoder(model, kernel=kernel, notify=notify)
        is_recurrent = self._decoder.cache.is_recurrent
        self.context_length = find_context_length(model, is_recurrent=is_recurrent)

    @property
    def record_name(self) -> str:
        """The name by which saved results of the model are found: other files, other results."""
        return f"{self.name} {self.fingerprint}" if self.fingerprint else self.name

    @property
    def tokenizer(self) -> Any:
        """The `mlx_lm` tokenizer (a `TokenizerWrapper`).

        Where `load` found a tokenizer that needs no transformers, this reads it in full at first
        use; conversations are rendered by it from then on.
        """
        if isinstance(self._tokenizer, FastTokenizer):
            self._tokenizer = self._tokenizer.read_in_full()
            self._chat_tokenizer = ChatTokenizer(self._tokenizer, name=self.name)
        return self._tokenizer

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        adapter: Path | str | None = None,
        cache_dir: Path | str | None = None,
        offline: bool = False,
        kernel: str = "auto",
        skip_memory_check: bool = False,
        progress: Progress = no_progress,
        notify: Notify = no_notice,
    ) -> SmallModel:
        """Load a model, downloading what is not cached.

        Call it before anything else imports MLX: on Linux it opens a faster BLAS than the one of
        MLX's CPU build, and MLX uses that only if it is open before MLX is imported.

        Args:
            spec: A catalogue name (`qwen2.5-coder-0.5b`), a model directory, a GGUF file or the id
                of a Hugging Face repository.
            adapter: A directory of LoRA weights, as `mlx_lm.lora` writes it. Default: none.
            cache_dir: The folder of weights and of the BLAS. Default: mlxroute's in the user cache.
            offline: Use cached and local files only. Default: False.
            kernel: As for the constructor. Default: `auto`.
            skip_memory_check: Load the model even if it needs more memory than is free. Default:
                False.
            progress: Receives the state of downloads and conversions. Default: ignored.
            notify: Receives lines for the user, such as the BLAS in use. Default: ignored.

        Raises:
            ConfigError: There is no home folder, or no folder for temporary files.
            CatalogError: The name is unknown, or a catalogue file cannot be used.
            WeightsError: The weights cannot be fetched, verified, converted or loaded.
            NotEnoughSpace: The model needs more disk space or memory than is free.
            UsageError: The adapter or the kernel cannot be used.
        """
        check_temporary_folder()
        adapter = None if adapter is None else Path(adapter)
        cache_dir = Path(cache_dir or cache_folder())
        local = resolve(
            str(spec),
            catalog=Catalog.load(user_catalog_dir()),
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
            notify=notify,
            check_size=accept_any_size if skip_memory_check else make_size_check(cache_dir),
        )
        name = adapted_name(local.name, adapter)
        blas_line = blas.interpose(cache_dir)
        from mlxroute.backend.load import check_memory, load, on_cpu

        if blas_line and on_cpu():
            notify(blas_line)
        if not skip_memory_check:
            check_memory(local.path, role="small")
        model, tokenizer = load(local.path, adapter=adapter, notify=notify)
        small = cls(model, tokenizer, name=name, kernel=kernel, notify=notify)
        small.plain_name, small.fingerprint = local.name, local.fingerprint
        if not small._chat_tokenizer.has_chat_template:
            notify(
                f"{local.name} has no chat template: its messages are joined by newlines and it may"
                " not stop; choose an instruction-tuned model, or add chat_template.jinja to"
                f" {local.path}"
            )
        return small

    def encode_conversation(
        self, messages: Sequence[Message], *, answer_start: str = ""
    ) -> EncodedPrompt:
        """Return the prompt of a conversation, ready for the assistant's answer.

        `answer_start`, empty by default, is the beginning of that answer. It and the message
        contents become plain text, also where they hold names of control tokens. Raises UsageError
        for messages that are not text, and for a chat template that cannot be used.
        """
        return self._chat_tokenizer.encode_conversation(messages, answer_start=answer_start)

    def encode_rendered(self, text: str) -> EncodedPrompt:
        """Return the prompt of a text that the caller rendered; its control tokens are meant."""
        return self._chat_tokenizer.encode_rendered(text)

    @property
    def cached_ids(self) -> Sequence[int]:
        """The ids of the sequence in the KV cache, prompt included, without the rows of a batch.

        A live view: it changes with the next step.
        """
        return self._decoder.cache.token_ids

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        """For each row of a batch, the ids it holds beyond `cached_ids`; empty without a batch."""
        return self._decoder.cache.batch_tails

    def prefill(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        progress: Progress = no_progress,
    ) -> tuple[Signals, int]:
        """Run a prompt; return the first position's signals and the number of ids reused.

        The KV cache keeps the prefix it shares with the prompt. The rest runs in chunks, except
        for the last id, which the first decode step feeds. Raises UsageError for an empty prompt.
        """
        parts = self.prefill_in_parts(prompt_ids, sampling=sampling, progress=progress, parts=1)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                reused: int = end.value
                break
        signals = self.step(prompt_ids[-1])
        progress("prompt", len(prompt_ids), len(prompt_ids))
        return signals, reused

    def prefill_in_parts(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        progress: Progress = no_progress,
        parts: int | None = None,
    ) -> Generator[None, None, int]:
        """Run a prompt without its last id; yield after each part, return the number of ids reused.

        The parts are those of `Decoder.prefill_in_parts`, for each chunk.
        """
        if not prompt_ids:
            raise UsageError("the prompt is empty")
        reused = self._decoder.begin(prompt_ids, sampling or Sampling())
        total = len(prompt_ids)
        done = reused
        progress("prompt", done, total)
        while total - done > 1:
            chunk = prompt_ids[done : min(done + PREFILL_STEP_SIZE, total - 1)]
            yield from self._decoder.prefill_in_parts(chunk, parts=parts)
            done += len(chunk)
            progress("prompt", done, total)
        return reused

    def step(self, token_id: int) -> Signals:
        """Feed one committed token; return the signals of the next position."""
        return self.extend((token_id,))

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed committed tokens in one pass; return the signals of the position after the last.

        The forward pass of the model's own next token is queued. If that token is fed next, the
        queued pass is used, else it is discarded.
        """
        return self._decoder.extend(token_ids)

    def score_text(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> ScoredText:
        """Return the model's signals at each position of an answer that another model wrote.

        Raises UsageError for an architecture whose hidden state cannot be read.
        """
        self._decoder.check_hidden_state()
        reused = self._decoder.begin(prompt_ids, Sampling())
        if len(prompt_ids) - 1 > reused:
            self._decoder.prefill(prompt_ids[reused:-1])
        return self._decoder.score_text((prompt_ids[-1], *answer_ids[:-1]), answer_ids)

    def prefill_copy(self, prompt_ids: Sequence[int]) -> tuple[Signals, CacheLayers]:
        """Run a prompt; return the first position's signals and a copy of the KV cache.

        The copy is a start for `continue_greedily`. The KV cache keeps the prefix it shares with
        the prompt. Raises UsageError for an empty prompt, and for a cache that cannot be decoded in
        a batch.
        """
        for _ in self.prefill_in_parts(prompt_ids, parts=1):
            pass
        # Alone, so that the logits of one position are computed.
        signals = self._decoder.extend_unqueued(prompt_ids[-1:])
        return signals, self.copy_cache(len(prompt_ids))

    def copy_cache(self, count: int) -> CacheLayers:
        """Return a copy of the KV cache's first `count` tokens.

        Raises UsageError for a cache that cannot be batched or cut there, RollbackError where it
        does not hold `count` tokens of one sequence.
        """
        return self._decoder.cache.copy(count)

    def with_own_cache(self) -> SmallModel:
        """Return a small model of the same weights, tokenizer and head with its own KV cache."""
        other = copy.copy(self)
        other._decoder = self._decoder.with_own_cache()
        return other

    @property
    def decoder(self) -> Decoder:
        """The decoder, for code that decodes several sequences.

        Everything else uses the methods of this class.
        """
        return self._decoder

    def continue_greedily(
        self, starts: Sequence[tuple[CacheLayers, int]], *, max_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continue several sequences greedily in one batch.

        Each start is a copy of the KV cache and the token that follows it. Returns the ids after
        that token, at most `max_tokens[i]` of them, without the end token. Rows of a batch round
        differently from a single row.
        """
        return self._decoder.continue_greedily(
            starts, max_tokens=max_tokens, eos_ids=self.vocabulary.eos_ids
        )

    def can_rollback(self, count: int) -> bool:
        """Return whether `count` tokens fed next could be rolled back.

        Some caches can never be rolled back; a sliding window cannot once it is full.
        """
        return self._decoder.cache.can_rollback(count)

    @property
    def max_rows(self) -> int:
        """Maximum number of rows for `branch` now: fewer after a long text, 1 without batches."""
        return self._decoder.cache.max_rows

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """Measure a decode step of one row and of `rows` rows, in a few steps each.

        `token_id` is the next token. The KV cache holds the same tokens afterwards.
        """
        return measure_branch_cost(self._decoder, token_id, rows=rows)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token to each row of a batch; return the signals after each.

        Row i continues row `parents[i]` of the previous batch; the first batch continues the single
        sequence, row 0. Rows of a batch round differently from a single row. `select` ends the
        batch.
        """
        return self._decoder.branch(parents, token_ids)

    def select(self, row: int) -> None:
        """End the batch and continue with one of its rows; without a batch do nothing."""
        self._decoder.cache.select(row)

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens from the KV cache. Raises RollbackError."""
        self._decoder.rollback(count)

    def reset_cache(self) -> None:
        """Empty the KV cache, whether or not it can be rolled back."""
        self._decoder.reset_cache()

    def load_head(self, path: Path) -> tuple[float, ...]:
        """Evaluate a head from a file from now on; return its scores at evenly spaced ranks.

        Raises WeightsError for a file that is not a head for this model, UsageError for an
        architecture whose hidden state cannot be read.
        """
        self.head = self._decoder.load_head(path)
        return self.head.quantiles

    @property
    def head_sha256(self) -> str | None:
        """The SHA-256 of the file of `head`, in hexadecimal; None without one."""
        return None if self.head is None else self.head.sha256

    def set_head(self, head: Head | None) -> None:
        """Evaluate a learned head in every step from now on, or none; `Signals` carry its score.

        Raises UsageError for an architecture whose hidden state cannot be read.
        """
        self._decoder.set_head(head)
