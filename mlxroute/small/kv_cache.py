"""The KV cache and the tokens it stands for: one owner, every trim and every branch counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlxroute.errors import RollbackError, UsageError

CacheCopy = list[Any]
"""Copies of KV caches, one a layer, that later steps do not change."""

_MOST_ROWS = 8
_BRANCH_BYTES = 1 << 30


class PrefixCache:
    """The KV cache of one sequence beside the ids it was computed from.

    `token_ids` equals what the layers hold, but for one token that may run ahead of them, and
    except after an interrupt in the middle of a forward pass; then the next prompt starts anew.
    While the sequence is branched the layers hold several rows of one length, and `tails` are what
    each has behind `token_ids`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.layers: list[Any] = make_prompt_cache(self._model)
        self.token_ids: list[int] = []
        self.tails: list[list[int]] = []
        self._ahead = 0
        self._whole = True

    @contextmanager
    def feeding(self, token_ids: Sequence[int]) -> Iterator[None]:
        """Run a forward pass of `token_ids` inside; an interrupt in it costs the whole cache.

        The ids count as soon as the layers hold them, evaluated or not.
        """
        self._whole = False
        yield
        self.token_ids.extend(token_ids)
        self._whole = True

    @contextmanager
    def branching(self, parents: Sequence[int], token_ids: Sequence[int]) -> Iterator[None]:
        """Run a forward pass inside of one token a row, row i continuing row `parents[i]`."""
        self._whole = False
        rows = max(1, len(self.tails))
        if list(parents) != list(range(rows)):
            self._take_rows(parents)
        yield
        tails = self.tails or [[]]
        self.tails = [[*tails[row], token] for row, token in zip(parents, token_ids, strict=True)]
        self._whole = True

    def select(self, row: int) -> None:
        """Go on with one row alone."""
        if not self.tails:
            return
        if not self._whole:
            raise RollbackError("a forward pass was interrupted; run a prompt first")
        if len(self.tails) > 1:
            self._take_rows([row])
        self.token_ids += self.tails[row]
        self.tails = []

    @property
    def max_rows(self) -> int:
        """How many rows the memory set aside for branches holds; 1 where layers cannot branch."""
        if not self.can_rollback or not all(_can_branch(layer) for layer in self.layers):
            return 1
        size: int = sum(layer.nbytes for layer in self.layers) // max(1, len(self.tails))
        return max(1, min(_MOST_ROWS, _BRANCH_BYTES // max(1, size)))

    def copy(self, count: int) -> CacheCopy:
        """Copies of the layers' first `count` tokens, fit for a batch.

        Raises UsageError for caches that no batch takes, or that cannot be cut there.
        """
        import mlx.core as mx

        if not self._whole or self._ahead or self.tails or not 0 < count <= len(self.token_ids):
            raise RollbackError(f"the KV cache holds no {count} tokens of one sequence")
        cut = count < len(self.token_ids)
        copies = [_cut(layer, count) if cut else _copy(layer) for layer in self.layers]
        mx.eval([part.state for part in copies])
        return copies

    def _take_rows(self, rows: Sequence[int]) -> None:
        import mlx.core as mx
        from mlx.utils import tree_map

        index = mx.array(list(rows))
        for layer in self.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                if held is not None:
                    setattr(layer, name, tree_map(lambda part: part[index], held))

    @contextmanager
    def running_ahead(self) -> Iterator[None]:
        """Run a forward pass inside of one token that may yet be taken back."""
        self._whole = False
        yield
        self._ahead = 1
        self._whole = True

    def confirm(self, token_id: int) -> None:
        """The token that ran ahead is committed, and this is its id."""
        self._ahead = 0
        self.token_ids.append(token_id)

    def take_back(self) -> None:
        """Drop the token that ran ahead, if there is one."""
        if self._ahead and self._whole:
            self._trim(1)
            self._ahead = 0

    @property
    def can_run_ahead(self) -> bool:
        """Whether every layer could give back one token more than it holds now."""
        return self.could_give_back(1)

    def could_give_back(self, count: int) -> bool:
        """Whether every layer could give back `count` tokens more than it holds now."""
        return self.can_rollback and all(_has_room(layer, count) for layer in self.layers)

    @property
    def can_rollback(self) -> bool:
        """Whether every layer's cache can give tokens back."""
        from mlx_lm.models.cache import can_trim_prompt_cache

        return bool(can_trim_prompt_cache(self.layers))

    def rollback(self, count: int) -> None:
        """Drop the last `count` tokens from every layer; RollbackError if a layer cannot."""
        if count == 0:
            return
        if not self._whole:
            raise RollbackError("a forward pass was interrupted; run a prompt first")
        if self.tails:
            raise RollbackError("the sequence is branched; select a row first")
        if count < 0 or count > len(self.token_ids):
            raise RollbackError(f"cannot roll back {count} of {len(self.token_ids)} tokens")
        self._trim(count)
        del self.token_ids[-count:]

    def _trim(self, count: int) -> None:
        from mlx_lm.models.cache import trim_prompt_cache

        trimmed = trim_prompt_cache(self.layers, count)
        if trimmed != count:
            raise RollbackError(
                f"the KV cache gave back {trimmed} of {count} tokens;"
                " this architecture cannot roll back"
            )

    def keep_common_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Keep what a new prompt shares with the cache, leaving its last id out; return the count.

        Exact hits need one token outside the cache to seed the first decode step.
        """
        if not self._whole:
            self.reset()
        self.select(0)
        common = 0
        for cached, wanted in zip(self.token_ids, prompt_ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        surplus = len(self.token_ids) - common
        if surplus and not self.can_rollback:
            self.reset()
            return 0
        self.rollback(surplus)
        return common


def _can_branch(layer: Any) -> bool:
    """Whether a layer is nothing but keys and values, by row."""
    return getattr(layer, "caches", None) is None and hasattr(layer, "keys")


def _has_room(layer: Any, count: int) -> bool:
    """Whether a layer can still be trimmed after `count` more tokens; a full window cannot."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(_has_room(part, count) for part in parts)
    size = getattr(layer, "max_size", None)
    return size is None or layer.offset + count < size


def _copy(layer: Any) -> Any:
    """The whole layer, apart from the one that goes on changing."""
    if not hasattr(layer, "merge"):
        raise UsageError(f"a cache of this kind ({type(layer).__name__}) cannot be in a batch")
    return copy.deepcopy(layer)


def _cut(layer: Any, count: int) -> Any:
    """The first tokens of a layer that is nothing but keys and values at full precision."""
    from mlx_lm.models.cache import KVCache

    if type(layer) is not KVCache:
        raise UsageError(
            "continuations from the middle of a text need plain KV caches, and this"
            f" architecture has {type(layer).__name__}"
        )
    part = KVCache()
    part.state = (layer.keys[..., :count, :], layer.values[..., :count, :], count)
    return part
