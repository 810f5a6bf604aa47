"""The hub's listing of a repository, and the reasons why it gives none."""

from __future__ import annotations

import os
from functools import partial
from json import JSONDecodeError
from queue import Empty
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, get_session, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mlxroute.errors import SourceUnreachable
from mlxroute.safe_text import printable_line, strip_secrets
from mlxroute.types import Notify
from mlxroute.weights.daemon_tasks import DaemonTasks
from mlxroute.weights.request import ANSWER_TIMEOUT_S

REFUSALS = (401, 403)
# ImportError: a SOCKS proxy is set and the package it needs is not installed. The last three: the
# answer has another form than the client expects.
_FAILURES = (HTTPError, OSError, ValueError, ImportError, AttributeError, TypeError, KeyError)
_PUBLIC_HUB = "https://huggingface.co"

# Hubs that timed out in this process; they are not tried again.
_unresponsive_hubs: set[str] = set()


def find_problem() -> str | None:
    """Return why the hub does not answer within five seconds; None if it does."""
    try:
        ask = partial(get_session().head, constants.ENDPOINT, timeout=ANSWER_TIMEOUT_S)
        with DaemonTasks([ask], threads=1) as request:
            request.next_result(ANSWER_TIMEOUT_S)
    except Empty:
        return f"no answer within {ANSWER_TIMEOUT_S:.0f} s{_mirror_note()}"
    except (HTTPError, OSError, ValueError, ImportError) as exc:
        return f"{_failure_reason(exc)}{_mirror_note()}"
    return None


def fetch_listing(hub_id: str, *, notify: Notify) -> tuple[ModelInfo, bool | None]:
    """Return a repository's listing, and the `token` argument for downloads from it.

    A hub that refuses the user's token is asked again without it, as for public repositories no
    token is needed. `notify` receives a line if that works. Raises SourceUnreachable if the hub
    gives no listing.
    """
    try:
        return _request_listing(hub_id, None), None
    except SourceUnreachable as exc:
        if not (http_status(exc.__cause__) in REFUSALS and get_token()):
            raise
        refusal = f"it refuses the token of {_token_source()}"
        gated = exc if isinstance(exc.__cause__, GatedRepoError) else None
    try:
        info = _request_listing(hub_id, False)
    except SourceUnreachable as exc:
        if gated is not None:
            raise gated from exc
        raise unreachable(
            f"{refusal}, and lists no public repository {hub_id}; renew the token, or remove it"
        ) from exc
    notify(f"hub: {refusal}; fetching {hub_id}, which is public, without it")
    return info, False


def _request_listing(hub_id: str, token: bool | None) -> ModelInfo:
    """Return the repository's listing; raise SourceUnreachable if the hub gives none.

    The request runs in a daemon thread, because a name look-up has no timeout.
    """
    if constants.ENDPOINT in _unresponsive_hubs:
        raise unreachable("it did not answer an earlier request")
    options: dict[str, Any] = {"files_metadata": True, "timeout": ANSWER_TIMEOUT_S, "token": token}
    try:
        ask = partial(HfApi().model_info, hub_id, **options)
        with DaemonTasks([ask], threads=1) as request:
            return _check_listing(request.next_result(ANSWER_TIMEOUT_S))
    except Empty as exc:
        _unresponsive_hubs.add(constants.ENDPOINT)
        raise unreachable(f"no answer within {ANSWER_TIMEOUT_S:.0f} s") from exc
    except OfflineModeIsEnabled as exc:
        raise unreachable("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to reach it") from exc
    except GatedRepoError as exc:
        raise unreachable(gate_reason(hub_id)) from exc
    except RepositoryNotFoundError as exc:
        raise unreachable(f"no repository {hub_id} (a private one needs HF_TOKEN)") from exc
    except HFValidationError as exc:
        raise unreachable(f"no repository can be named {hub_id}") from exc
    except _FAILURES as exc:
        raise unreachable(_failure_reason(exc)) from exc


def _failure_reason(exc: Exception) -> str:
    status = http_status(exc)
    if isinstance(exc, UnicodeEncodeError) and get_token():
        return f"the token of {_token_source()} has characters that no token has"
    if isinstance(exc, (JSONDecodeError, AttributeError, TypeError, KeyError)):
        return "its answer is not a listing of files; it may be the page of a login"
    if isinstance(exc, OSError) and exc.filename and status is None:
        file = printable_line(f"{exc.filename}: {exc.strerror}")
        return f"its token cannot be read ({file}); check HF_HOME"
    verb = "not reachable" if status is None else f"it answers {status}"
    return f"{verb} ({failure_text(exc)})"


def failure_text(exc: Exception) -> str:
    """Return the message of an error as one line, without a password in its addresses."""
    words = [strip_secrets(word) if "@" in word else word for word in str(exc).split()]
    return printable_line(" ".join(words)) or type(exc).__name__


def gate_reason(hub_id: str) -> str:
    """Return why the hub gives no files of a repository with a licence to accept."""
    return f"{hub_id} asks you to accept its licence on its page and to set HF_TOKEN"


def _check_listing(info: ModelInfo) -> ModelInfo:
    """Raise TypeError for a listing with sizes that are not numbers."""
    for entry in info.siblings or ():
        size = 0 if entry.size is None else entry.size
        if type(size) is not int or size < 0:
            raise TypeError(f"the size of {entry.rfilename} is {size!r}")
    return info


def unreachable(reason: str) -> SourceUnreachable:
    """Return the error for a hub that gives no usable listing; it names what HF_ENDPOINT is."""
    return SourceUnreachable(f"hub: {reason}{_mirror_note()}")


def _mirror_note() -> str:
    endpoint = constants.ENDPOINT
    shown = printable_line(strip_secrets(endpoint))
    return "" if endpoint == _PUBLIC_HUB else f"; HF_ENDPOINT is {shown}"


def _token_source() -> str:
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((name for name in variables if os.environ.get(name)), constants.HF_TOKEN_PATH)


def http_status(exc: BaseException | None) -> int | None:
    """Return the HTTP status that the client reports; None if there was no answer."""
    if not isinstance(exc, HfHubHTTPError):
        return None
    status: int | None = getattr(exc.response, "status_code", None)
    return status
