"""The KV cache and the tokens it stands for: one owner, every trim counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlxroute.errors import RollbackError


class PrefixCache:
    """The KV cache of one sequence beside the ids it was computed from.

    `token_ids` equals what the layers hold, but for one token that may run ahead of them, and
    except after an interrupt in the middle of a forward pass; then the next prompt starts anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.layers: list[Any] = make_prompt_cache(self._model)
        self.token_ids: list[int] = []
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
        return self.can_rollback and all(_has_room(layer) for layer in self.layers)

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


def _has_room(layer: Any) -> bool:
    """Whether a layer can still be trimmed after one more token; a full window cannot."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(_has_room(part) for part in parts)
    size = getattr(layer, "max_size", None)
    return size is None or layer.offset + 1 < size
