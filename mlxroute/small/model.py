"""The small model: load, prefill, decode step, rollback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlxroute.errors import RollbackError, UsageError
from mlxroute.small.cache import PrefixCache
from mlxroute.small.kernels import pack_signals, unpack
from mlxroute.small.vocabulary import TokenVocabulary
from mlxroute.types import Message, Notify, Progress, Sampling, Signals, no_notice, no_progress

if TYPE_CHECKING:
    import mlx.core as mx

# As `mlx_lm.generate_step`, so that the same prompt rounds the same way.
PREFILL_STEP_SIZE = 2048
_CLEAR_CACHE_EVERY = 256
_DEFAULT_CONTEXT = 4096
_CONTEXT_KEY = "max_position_embeddings"


class SmallModel:
    """A model that `mlx_lm` loads, with its KV cache, decoding one position at a time.

    `model` and `tokenizer` are the `mlx_lm` objects. Not safe for use from several threads.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = TokenVocabulary(tokenizer)
        self.context_length = _context_length(model)
        self._cache = PrefixCache(model)
        self._tap = _HiddenStateTap(model)
        self._steps = 0
        self._set_sampling(Sampling())

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        adapter: Path | None = None,
        cache_dir: Path | None = None,
        offline: bool = False,
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
        return cls(model, tokenizer, name=local.name)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        Raises UsageError when the chat template refuses the conversation.
        """
        if not self.tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                # Routing is about the answer's tokens; templates without the switch ignore it.
                enable_thinking=False,
            )
        except TemplateError as exc:
            raise UsageError(
                f"the chat template of {self.name} refuses this conversation: {exc}"
            ) from exc
        return text

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt; special tokens in it are parsed, a missing BOS is added."""
        bos = self.vocabulary.bos_text
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=bool(bos) and not text.startswith(bos)
        )
        return ids

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The ids the KV cache holds."""
        return tuple(self._cache.token_ids)

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
        import mlx.core as mx

        if not prompt_ids:
            raise UsageError("the prompt is empty")
        self._set_sampling(sampling or Sampling())
        reused = self._cache.keep_common_prefix(prompt_ids)
        total = len(prompt_ids)
        done = reused
        progress("prompt", done, total)
        while total - done > 1:
            chunk = prompt_ids[done : min(done + PREFILL_STEP_SIZE, total - 1)]
            with self._cache.feeding(chunk):
                self.model(mx.array(list(chunk))[None], cache=self._cache.layers)
            mx.eval([layer.state for layer in self._cache.layers])
            done += len(chunk)
            progress("prompt", done, total)
            mx.clear_cache()
        signals = self.step(prompt_ids[-1])
        progress("prompt", total, total)
        return signals, reused

    def step(self, token_id: int) -> Signals:
        """Feed one committed token; return the signals of the position after it."""
        return self.extend((token_id,))

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed committed tokens in one pass; return the signals of the position after the last."""
        import mlx.core as mx

        with self._cache.feeding(token_ids):
            logits = self.model(mx.array(list(token_ids))[None], cache=self._cache.layers)
        (values,) = cast("list[list[float]]", self._pack(logits[:, -1, :]).tolist())
        signals = unpack(values)
        self._steps += 1
        if self._steps % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return signals

    def rollback(self, count: int) -> None:
        """Take the last `count` fed tokens back. Raises RollbackError."""
        self._cache.rollback(count)
        self._tap.forget()

    def hidden_state(self) -> mx.array:
        """Final-norm output at the last fed position, [hidden size], in the model's dtype.

        Raises RollbackError before the first step or after a rollback, UsageError for an
        architecture whose final norm is not known.
        """
        state = self._tap.last()
        if state is None:
            raise RollbackError("no hidden state: run a step first")
        last: mx.array = state[0, -1]
        return last

    def _pack(self, logits: mx.array) -> mx.array:
        """The packed row, with the sampled token in the greedy one's place when sampling."""
        import mlx.core as mx

        packed = pack_signals(logits)
        if self._sampler is None:
            return packed
        token = self._sampler(logits - mx.logsumexp(logits, keepdims=True)).reshape(1, 1)
        chosen = mx.take_along_axis(logits, token, axis=-1)
        parts = [token.astype(mx.float32), chosen.astype(mx.float32), packed[:, 2:]]
        return mx.concatenate(parts, axis=-1)

    def _set_sampling(self, sampling: Sampling) -> None:
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        self._sampler = (
            make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
            if sampling.temperature > 0
            else None
        )
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)


class _HiddenStateTap:
    """Remembers what a model's final norm last returned, without a second forward pass."""

    def __init__(self, model: Any) -> None:
        self._seen: list[Any] = []
        norm = _final_norm(model)
        self._found = norm is not None
        if norm is None:
            return
        seen = self._seen
        plain = type(norm)

        def call(module: Any, hidden: Any) -> Any:
            output = plain.__call__(module, hidden)
            seen[:] = [output]
            return output

        norm.__class__ = type(plain.__name__, (plain,), {"__call__": call})

    def forget(self) -> None:
        self._seen.clear()

    def last(self) -> Any:
        if not self._found:
            raise UsageError("this architecture's final hidden state is not known to mlxroute")
        return self._seen[0] if self._seen else None


def _final_norm(model: Any) -> Any:
    for holder in (model, getattr(model, "language_model", None)):
        norm = getattr(getattr(holder, "model", None), "norm", None)
        if norm is not None:
            return norm
    return None


def _context_length(model: Any) -> int:
    for holder in (model, getattr(model, "language_model", None)):
        args = getattr(holder, "args", None)
        text = getattr(args, "text_config", None) or {}
        for value in (getattr(args, _CONTEXT_KEY, None), text.get(_CONTEXT_KEY)):
            if value:
                return int(value)
    return _DEFAULT_CONTEXT
