"""Errors that mlxroute raises. A message names what was wrong, where, and what to do.

MlxRouteError
├── UsageError              a wrong argument or input file
├── ConfigError             a wrong config file, environment value or key file
├── CatalogError            an unknown model name, or a broken catalogue file
├── WeightsError            weights cannot be fetched, verified, converted or loaded
│   ├── SourceUnreachable     a source of models did not answer, or lacks the model
│   ├── CorruptWeights        a file is not what was published or stored
│   └── NotEnoughSpace        disk or memory is short
├── ContextTooLong          the prompt does not fit the model's context
├── RollbackError           the KV cache cannot return to an earlier position
├── LaunchError             the local server could not be started, or ended
└── LargeError              the large model gave no usable token
    ├── LargeTimeout          no complete reply before the deadline
    ├── LargeUnreachable      no connection, or the connection broke
    ├── LargeUnavailable      no call was made, because earlier calls failed or hang
    ├── LargeRefused          an error status, a redirect, or an error in the body
    ├── LargeUnrecorded       the ledger cannot be written, so nothing was sent
    └── LargeProtocolError    a reply that cannot be trusted as a token
        ├── LargeUnreadable     a reply that is not HTTP, not a JSON object, or too long
        ├── LargeUnsendable     a prompt that this server cannot take; nothing was sent
        │   └── LargeTruncated    the server cut the prompt; a call was made
        └── LargeNotContinued   the server did not, or cannot, continue the answer
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

# The later lines are of xAI and Groq, of Text Generation Inference, and of DashScope.
_TOO_LONG: Final = re.compile(
    r"context|too long|maximum length|(maximum|exceed).{0,40} tokens"
    r"|maximum prompt length|reduce the length of the messages"
    r"|inputs\W+tokens \+ \W*max_new_tokens\W+must be|inputs\W+must have less than \d+ tokens"
    r"|range of input length",
    re.IGNORECASE,
)


class MlxRouteError(Exception):
    """Base class of every error that mlxroute raises on purpose.

    Args:
        message: One line for the user. Empty by default.
        parameter: Name of the argument that caused the error, or whose value avoids it; None
            (default) if no argument does. The command line adds the flag that sets it, or the
            config file or environment variable that did.
    """

    def __init__(self, message: str = "", *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class UsageError(MlxRouteError):
    """Raised for a wrong argument: a value, an address, a prompt or a file given by the user."""


class ConfigError(MlxRouteError):
    """Raised when a config file, an environment variable or a key file is wrong."""


class CatalogError(MlxRouteError):
    """Raised for an unknown model name, and for a catalogue file that cannot be used."""


class WeightsError(MlxRouteError):
    """Raised when weights cannot be fetched, verified, converted or loaded."""


class SourceUnreachable(WeightsError):
    """Raised when a source of models does not answer or lacks the model.

    The next source is tried; the error reaches the caller when there is none left.
    """


class CorruptWeights(WeightsError):
    """Raised when a downloaded or cached file is not what was published or stored."""


class NotEnoughSpace(WeightsError):
    """Raised when a model needs more disk space or memory than is free."""


class ContextTooLong(MlxRouteError):
    """Raised when a prompt has more tokens than the small model's context holds."""


class RollbackError(MlxRouteError):
    """Raised when the KV cache cannot return to an earlier position."""


class LaunchError(MlxRouteError):
    """Raised when a local server cannot be started, or ends by itself."""


class LargeError(MlxRouteError):
    """Base class of the errors of one call to the large model: it gave no usable token.

    Attributes:
        counts_as_failure: Whether it shows a fault of the server or of the settings. False where
            nothing was sent, and where the server works but not for this answer.
        was_called: Whether a call was made. False where nothing was sent.
    """

    counts_as_failure: ClassVar[bool] = True
    was_called: ClassVar[bool] = True


class LargeTimeout(LargeError):
    """Raised when no complete reply arrives before the deadline."""


class LargeUnreachable(LargeError):
    """Raised when the server cannot be connected to, or the connection breaks."""


class LargeUnavailable(LargeError):
    """Raised instead of making a call, because earlier calls failed or still hang.

    A call that `close` cancels raises it too; its request may have been sent.
    """

    counts_as_failure = was_called = False


class LargeRefused(LargeError):
    """Raised when the server answers with an error status, a redirect, or an error in the body.

    Args:
        message: One line for the user.
        status: HTTP status of the reply; 0 (default) if it is not known.
        retry_after_s: Seconds the server asks clients to wait before the next request. 0 by
            default.
        in_body: Whether the reply had status 200, so that it was not repeated; `status` is the one
            that its body names, or 200. False by default.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        retry_after_s: float = 0.0,
        in_body: bool = False,
        parameter: str | None = None,
    ) -> None:
        super().__init__(message, parameter=parameter)
        self.status = status
        self.retry_after_s = retry_after_s
        self.in_body = in_body

    @property
    def may_pass(self) -> bool:
        """Whether the status is about load or the server's health, not about the request."""
        # Those from 520 on are Cloudflare's, and 529 is also Anthropic's.
        return self.status in (408, 429, 502, 503, 504) or 520 <= self.status <= 529

    @property
    def is_access(self) -> bool:
        """Whether the status is about the key, the payment or the permission of the client."""
        return self.status in (401, 402, 403)

    @property
    def may_lack_route(self) -> bool:
        """Whether a proxy may mean, by the status, that it has no server for the path."""
        is_proxy_status = self.status in (502, 503, 504) and not self.retry_after_s
        return is_proxy_status and "loading" not in self._reason.lower()

    @property
    def is_too_long(self) -> bool:
        """Whether the prompt is too long for the server, as far as its words tell."""
        return self.status in (400, 413, 422) and _TOO_LONG.search(self._reason) is not None

    @property
    def _reason(self) -> str:
        # The address may hold any word.
        return re.sub(r"\S+://\S+", "", str(self))


class LargeUnrecorded(LargeError):
    """Raised when the ledger cannot record a request, which is therefore not sent."""

    counts_as_failure = was_called = False


class LargeProtocolError(LargeError):
    """Raised for a reply that cannot be trusted as a token of the large model."""


class LargeUnreadable(LargeProtocolError):
    """Raised for a reply that is not HTTP, not a JSON object, or too long.

    What is between client and server may have sent it, so it shows nothing about the server.
    """


class LargeUnsendable(LargeProtocolError):
    """Raised for a prompt that this server cannot take, whatever the answer.

    Nothing is sent, unless it is a LargeTruncated.

    Such a prompt is longer than the context, is a text where the server takes only conversations,
    or is a conversation whose last answer the server would continue instead of beginning a new one.
    """

    counts_as_failure = was_called = False


class LargeTruncated(LargeUnsendable):
    """Raised for the reply to a prompt that the server cut, as it is longer than its context."""

    was_called = True


class LargeNotContinued(LargeProtocolError):
    """Raised where the server does not continue the answer, or cannot be asked to.

    The server works, and may well continue the answer at another position. It cannot be asked
    where the answer so far ends inside a character and the server takes only text. A special token
    that the small model lacks does not continue the answer either.
    """

    counts_as_failure = False
