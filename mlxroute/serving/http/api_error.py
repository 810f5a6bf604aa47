"""Errors as the endpoint replies them: a status, and one JSON form."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import JSONResponse

from mlxroute.engine.escalation.failures import failure_kind
from mlxroute.errors import ContextTooLong, LargeError, MlxRouteError, UsageError
from mlxroute.safe_text import printable_line
from mlxroute.serving.requests import QueueFull, SchedulerClosed
from mlxroute.types import Notify

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
RETRY_AFTER_S: Final = 5


class ApiError(Exception):
    """Raised for a request that is refused or has failed.

    Args:
        status: The HTTP status.
        message: One line: what is wrong, and what to do.
        param: The field of the request that is wrong. None (default) if it is not a field.
        code: A short name of the error for programs. None by default.
        retry_after_s: Seconds after which the request may succeed. None (default) if it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = printable_line(message, limit=600)
        self.param = param if param is None else printable_line(param, limit=100)
        self.code = code
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    def body(self) -> dict[str, Any]:
        """Return the JSON value of the error."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def wrong(param: str, message: str, *, code: str | None = None) -> ApiError:
    """Return the error for a field that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def to_api_error(exc: BaseException, *, calls: int = 0) -> ApiError:
    """Return what is replied for an exception, after `calls` calls to the large model.

    A client must not repeat a request on its own that has cost calls.
    """
    error = _to_api_error(exc)
    # The official clients repeat these.
    if calls and (error.status in (408, 409) or error.status >= 429):
        error.headers["x-should-retry"] = "false"
    return error


def log_failure(exc: BaseException, notify: Notify) -> None:
    """Write a line about an exception that is not a fault of the request; about others nothing.

    For an ApiError it is about the exception that it was raised from.
    """
    origin = (exc.__cause__ or exc) if isinstance(exc, ApiError) else exc
    if isinstance(origin, LargeError):
        # The server's own words may quote the request.
        notify(f"error: the large model failed ({failure_kind(origin)})")
    elif to_api_error(exc).status == 500:
        notify(printable_line(f"error: {type(origin).__name__}: {origin}", limit=600))


def _to_api_error(exc: BaseException) -> ApiError:
    match exc:
        case ApiError():
            return exc
        case QueueFull():
            return ApiError(429, str(exc), code="queue_full", retry_after_s=RETRY_AFTER_S)
        case SchedulerClosed():
            return ApiError(503, str(exc), code="closing", retry_after_s=RETRY_AFTER_S)
        case ContextTooLong():
            return ApiError(400, str(exc), param="messages", code="context_length_exceeded")
        case UsageError():
            return ApiError(400, str(exc), param=exc.parameter)
        case LargeError():
            return ApiError(502, f"the large model failed: {exc}", code="large_model_failed")
        case MlxRouteError():
            return ApiError(500, str(exc))
    return ApiError(500, f"the answer failed with {type(exc).__name__}; see the server's output")
