"""The large model of the settings: its client, its ledger, and its tokenizer if that is cached."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.error_advice import error_message
from mlxroute.cli.folders import cache_dir_of, expand_optional
from mlxroute.cli.terminal import WARNING_STYLE, print_note, redraw
from mlxroute.config import (
    Secret,
    Settings,
    default_config_path,
    read_key,
    read_never_send,
    user_catalog_dir,
)
from mlxroute.config.server_key import DEFAULT_KEY_ENV, is_open_to_others
from mlxroute.errors import LargeError, LargeUnrecorded, UsageError, WeightsError
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable

# A server that has its model in memory answers sooner.
_SLOW_REPLY_S = 5.0

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.large import LargeModel
    from mlxroute.large.http.address import Address
    from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
    from mlxroute.types import Message


def open_ledger(settings: Settings) -> Ledger:
    """Open the record of what is sent, in the file of the settings if they name one."""
    return Ledger(expand_optional(settings.ledger))


def require_large(settings: Settings, command: str) -> str:
    """Return the server's address. Raises UsageError, for the command, if none may be asked."""
    if settings.offline:
        raise UsageError(f"{command} asks a large model, but the settings say `offline`")
    if settings.large is None:
        raise UsageError(f"{command} needs the server of a large model; give --large URL")
    return settings.large


def check_sendable(
    settings: Settings, conversations: Iterable[tuple[str, Sequence[Message]]], command: str
) -> None:
    """Raise UsageError, which names the conversation, if a never-send pattern matches one.

    `conversations` are pairs of a name, which several may have, and messages.
    """
    from mlxroute.engine.escalation.never_send import find_match

    patterns = read_never_send(settings)
    for name, conversation in conversations if patterns else ():
        texts = [str(message["content"]) for message in conversation]
        if (number := find_match(patterns, texts)) is not None:
            raise UsageError(
                f"{name} matches never-send pattern {number}, and {command} would send it;"
                " leave it out"
            )


def connect_large(
    settings: Settings, ledger: Ledger, err: Console
) -> tuple[LargeModel | None, str | None]:
    """Return the large model, None if there is none, and why it cannot be used yet, if so.

    A failure is printed as a warning unless `strict`.
    """
    if settings.offline or settings.large is None:
        if settings.strict:
            raise UsageError("--strict needs a large model: give --large, and not --offline")
        return None, None
    large = make_large(settings, settings.large, ledger, err)
    reason: str | None = None
    try:
        status = first_reply_status(large, err, f"connecting to {large.base_url}")
        with model_notes(large, err), status:
            large.connect()
    except LargeUnrecorded as exc:
        raise UsageError(str(exc), parameter=exc.parameter) from exc
    except LargeError as exc:
        if settings.strict:
            raise
        failure, reason = printable(error_message(exc)), str(exc)
        text = f"warning: {failure}; until it answers, the small model writes alone"
        print_note(err, text, style=WARNING_STYLE)
    return large, reason


def make_large(settings: Settings, address: str, ledger: Ledger, err: Console) -> LargeModel:
    """Return a client, not yet connected, for the server at the address; print warnings."""
    from mlxroute.large import LargeModel

    key = find_key(settings, address)
    for line in _secret_warnings(settings, address, has_key=key is not None):
        print_note(err, f"warning: {line}", style=WARNING_STYLE)
    return LargeModel(
        address,
        model=settings.large_model,
        api_key=key.reveal() if key else None,
        timeout_s=settings.timeout,
        ca_bundle=expand_optional(settings.ca_bundle),
        ledger=ledger,
        verdicts=cache_dir_of(settings) / "endpoints.json",
        find_tokenizer=make_tokenizer_finder(settings, address),
    )


@contextmanager
def first_reply_status(large: LargeModel, err: Console, title: str) -> Iterator[None]:
    """Show that a server is waited for, and after a while why that can take long."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    limit_s = large.first_reply_timeout_s
    text = (
        f"waiting for {large.base_url}: it may be loading the model; {limit_s:g} s at most,"
        " which --timeout raises"
    )

    def explain() -> None:
        if not large.has_replied:
            print_note(err, text)

    timer = threading.Timer(_SLOW_REPLY_S, explain)
    timer.daemon = True
    bars = Progress(*columns, console=err, transient=True, disable=not err.is_interactive)
    bars.add_task(title, total=None)
    with redraw(err, pause=bars.stop, resume=bars.start):
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def model_notes(large: LargeModel, err: Console) -> Iterator[None]:
    """After the block, or its failure, print what the user may not expect of the model."""
    try:
        yield
    finally:
        if large.listed_instead is not None:
            text = f"{large.base_url} does not list the model {large.model_name}; it lists"
            print_note(err, f"{text} {large.listed_instead}")
        if large.is_approximate:
            text = "only chats, so it is asked by example: its tokens are not those of its own"
            print_note(err, f"{large.model_name} {text} answer")


def find_key(settings: Settings, address: str) -> Secret | None:
    """Return the key for a server; None if its address holds a user and a password."""
    from mlxroute.large.http.address import parse_address

    return None if parse_address(address).userinfo else read_key(settings, os.environ)


def _secret_warnings(settings: Settings, typed: str, *, has_key: bool) -> Iterator[str]:
    """Yield what the user should know about the secret that is sent; `typed` is the address."""
    from mlxroute.large.http.address import parse_address

    address = parse_address(typed)
    names_key = settings.key_file is not None or settings.key_env is not None
    if address.userinfo and names_key:
        yield "the user and password of the address are sent, not the key that the settings name"
    if address.userinfo and any(typed in word for word in sys.argv[1:]):
        yield (
            "a password on the command line is visible to other users of this machine;"
            " OPENAI_BASE_URL or the config file can hold the address"
        )
    if address.userinfo and typed == settings.large and _is_from_open_file(settings):
        file = default_config_path()
        yield f"other users can open {file}, which has a password; run `chmod 600 {file}`"
    if address.is_loopback or not (has_key or address.userinfo):
        return
    usual = settings.key_server if names_key else os.environ.get("OPENAI_BASE_URL")
    if has_key and usual and not _is_same_host(usual, address):
        yield (
            f"the key in {settings.key_env or settings.key_file or DEFAULT_KEY_ENV} goes to"
            f" {address.url}, but {'the settings name' if names_key else 'OPENAI_BASE_URL names'}"
            " another server; --key-env and --key-file name another key"
        )
    if address.url.startswith("http://"):
        secret = "password" if address.userinfo else "key"
        yield f"the {secret} goes to {address.url} unencrypted; use https outside your own network"


def _is_from_open_file(settings: Settings) -> bool:
    """Return whether the address is that of the config file, and other users can open the file."""
    path = default_config_path()
    is_from_file = settings.origins.get("large", "").endswith(f" in the config file {path}")
    return is_from_file and os.path.exists(path) and is_open_to_others(path)


def _is_same_host(text: str, address: Address) -> bool:
    from mlxroute.large.http.address import parse_address

    try:
        return parse_address(text).host == address.host
    except UsageError:
        return False


def make_tokenizer_finder(
    settings: Settings, address: str
) -> Callable[[str], ChatTokenizer | None]:
    """Return a function that loads the tokenizer of a model by the name its server reports.

    It returns None if the tokenizer's files are not on this machine.
    """

    def find(name: str) -> ChatTokenizer | None:
        from mlxroute.large.http.address import parse_address

        cache_dir = cache_dir_of(settings)
        # A server on this machine may report the model's folder as its name.
        folders = [Path(name)] if parse_address(address).is_loopback else []
        folders += _cached_folders(name, cache_dir)
        for folder in folders:
            # Unlike `is_file` of a Path, it is False for a folder that may not be entered.
            if folder.is_absolute() and os.path.isfile(folder / "tokenizer.json"):
                tokenizer = _load_tokenizer(folder, name, cache_dir)
                if tokenizer is not None:
                    return tokenizer
        return None

    return find


def _load_tokenizer(folder: Path, name: str, cache_dir: Path) -> ChatTokenizer | None:
    from mlxroute.backend import blas

    # Importing the tokenizer imports MLX, which must find the faster BLAS.
    blas.interpose(cache_dir)
    from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer

    try:
        return ChatTokenizer.load(folder, name=name)
    except WeightsError:
        return None


def _cached_folders(name: str, cache_dir: Path) -> list[Path]:
    """Return the folder of the catalogue model with this name or hub id, if it is cached."""
    from mlxroute.catalog import Catalog
    from mlxroute.weights import list_cached

    models = Catalog.load(user_catalog_dir()).models
    names = {model.name for model in models if name in (model.name, model.hub_id)}
    return [entry.path.absolute() for entry in list_cached(cache_dir) if entry.name in names]
