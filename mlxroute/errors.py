"""Every error mlxroute raises on purpose. Messages say what was wrong, where, and what to do.

MlxRouteError
├── UsageError            a wrong value from the user: flag, prompt, address
├── ConfigError           a wrong config file or environment value
├── CatalogError          no such model or pair
├── WeightsError          weights cannot be fetched, verified, converted or loaded
│   ├── SourceUnreachable   one source did not answer (the next one is tried)
│   ├── CorruptWeights      a cached file is not what was downloaded
│   └── NotEnoughSpace      disk or memory is short
├── ContextTooLong        the prompt does not fit the model's context
├── RollbackError         the KV cache cannot be brought back to an earlier position
├── LaunchError           the local server could not be started
└── LargeError            the large model gave no usable token
    ├── LargeTimeout        no full reply in time
    ├── LargeUnreachable    no connection, or it broke
    ├── LargeUnavailable    not asked at all, after what happened to the last calls
    ├── LargeRefused        an HTTP error status, or an error in the body
    ├── LargeUnrecorded     the ledger cannot be written, so nothing was sent
    └── LargeProtocolError  a reply that cannot be trusted as a token
"""

from __future__ import annotations


class MlxRouteError(Exception):
    """Base of the tree; its text is one line fit for a user.

    `parameter` names the argument that caused the error or whose value avoids it, None if no
    argument does. The command line adds the flag that sets it.
    """

    def __init__(self, message: str = "", *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class UsageError(MlxRouteError): ...


class ConfigError(MlxRouteError): ...


class CatalogError(MlxRouteError): ...


class WeightsError(MlxRouteError): ...


class SourceUnreachable(WeightsError): ...


class CorruptWeights(WeightsError): ...


class NotEnoughSpace(WeightsError): ...


class ContextTooLong(MlxRouteError): ...


class RollbackError(MlxRouteError): ...


class LaunchError(MlxRouteError): ...


class LargeError(MlxRouteError): ...


class LargeTimeout(LargeError): ...


class LargeUnreachable(LargeError): ...


class LargeUnavailable(LargeError): ...


class LargeRefused(LargeError):
    """`status` is the reply's; `retry_after_s` the seconds the server wants to be left alone."""

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class LargeUnrecorded(LargeError): ...


class LargeProtocolError(LargeError): ...
