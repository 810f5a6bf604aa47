"""The models of an endpoint: the routed pair, and each of the two alone."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from mlxroute.large.negotiation.served_models import UNNAMED
from mlxroute.safe_text import printable_line
from mlxroute.serving.http.api_error import ApiError
from mlxroute.serving.http.serving_session import ServingSession

ALIAS: Final = "mlxroute"
"""A name of the routed model that stays the same whatever the pair is."""


class ModelRole(StrEnum):
    """Which of the two models answer a request."""

    ROUTED = "routed"
    SMALL = "small"
    LARGE = "large"


class ModelNames:
    """The ids of the models of a session.

    Args:
        session: The session.
        created: Unix time, in seconds, at which the endpoint was started.
    """

    def __init__(self, session: ServingSession, created: int) -> None:
        self._small, self._large = session.small_name, session.large
        # The server may be down at the start, so that its model becomes known later.
        self._pair = printable_line(self._small, limit=200) if self._large is None else ""
        self._context_length = session.small.context_length
        self._created = created

    @property
    def pair(self) -> str:
        """The id of the routed model; the alias while the large model's name is not known.

        Once the name is known, the id stays.
        """
        if not self._pair and self._large is not None and self._large.model_name != UNNAMED:
            self._pair = printable_line(f"{self._small}+{self._large.model_name}", limit=200)
        return self._pair or ALIAS

    def id_of(self, role: ModelRole) -> str:
        """Return the id of a model."""
        return self.pair if role is ModelRole.ROUTED else f"{self.pair}:{role}"

    def role(self, name: str | None) -> ModelRole:
        """Return the role of the model with this id; without one, the routed model's.

        Raises ApiError for an unknown id.
        """
        if name is None:
            return ModelRole.ROUTED
        for role in self._roles():
            suffix = "" if role is ModelRole.ROUTED else f":{role}"
            if name in (f"{self.pair}{suffix}", f"{ALIAS}{suffix}"):
                return role
        known = ", ".join(self.id_of(role) for role in self._roles())
        other = "" if self.pair == ALIAS else f", and {ALIAS} is another name of the first"
        raise ApiError(
            404,
            f"there is no model {printable_line(name, limit=100)!r}; this endpoint serves"
            f" {known}{other}",
            param="model",
            code="model_not_found",
        )

    def describe(self, role: ModelRole) -> dict[str, Any]:
        """Return the entry of a model in `/v1/models`."""
        return {
            "id": self.id_of(role),
            "object": "model",
            "created": self._created,
            "owned_by": "mlxroute",
            "context_length": self._context_length,
            "max_model_len": self._context_length,
        }

    def describe_all(self) -> dict[str, Any]:
        """Return the body of `/v1/models`."""
        return {"object": "list", "data": [self.describe(role) for role in self._roles()]}

    def _roles(self) -> list[ModelRole]:
        """Return the models that there are."""
        has_large = self._large is not None
        return [role for role in ModelRole if has_large or role is not ModelRole.LARGE]
