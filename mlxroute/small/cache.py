"""The KV cache and the tokens it stands for: one owner, every trim counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxroute.errors import RollbackError


class PrefixCache:
    """The KV cache of one sequence beside the ids it was computed from.

    `token_ids` always equals what the layers hold, also after an interrupt in mid-step.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.layers: list[Any] = make_prompt_cache(self._model)
        self.token_ids: list[int] = []

    @property
    def can_rollback(self) -> bool:
        """Whether every layer's cache can give tokens back."""
        from mlx_lm.models.cache import can_trim_prompt_cache

        return bool(can_trim_prompt_cache(self.layers))

    def rollback(self, count: int) -> None:
        """Drop the last `count` tokens from every layer; RollbackError if a layer cannot."""
        from mlx_lm.models.cache import trim_prompt_cache

        if count == 0:
            return
        if count < 0 or count > len(self.token_ids):
            raise RollbackError(f"cannot roll back {count} of {len(self.token_ids)} tokens")
        trimmed = trim_prompt_cache(self.layers, count)
        if trimmed != count:
            raise RollbackError(
                f"the KV cache gave back {trimmed} of {count} tokens;"
                " this architecture cannot roll back"
            )
        del self.token_ids[-count:]

    def keep_common_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Keep what a new prompt shares with the cache, leaving its last id out; return the count.

        Exact hits need one token outside the cache to seed the first decode step.
        """
        self._settle()
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

    def _settle(self) -> None:
        """Bring layers back in step with the ids after an interrupt in mid-step."""
        known = len(self.token_ids)
        for layer in self.layers:
            surplus = getattr(layer, "offset", -1) - known
            if surplus < 0 or (
                surplus and (not layer.is_trimmable() or layer.trim(surplus) != surplus)
            ):
                self.reset()
                return
