"""The large model of the settings: its client, its ledger, and its tokenizer if that is cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of, expand_optional
from mlxroute.config import Settings, read_key, user_catalog_dir
from mlxroute.errors import UsageError, WeightsError
from mlxroute.ledger import Ledger

if TYPE_CHECKING:
    from mlxroute.large import LargeModel
    from mlxroute.tokenizers.chat_template import ChatTokenizer


def open_ledger(settings: Settings) -> Ledger:
    """Open the record of what is sent, in the file of the settings if they name one."""
    return Ledger(expand_optional(settings.ledger))


def require_large(settings: Settings, command: str) -> str:
    """Return the server's address. Raises UsageError, for the command, if none is set."""
    if settings.large is None:
        raise UsageError(f"{command} needs the server of a large model; give --large URL")
    return settings.large


def make_large(settings: Settings, address: str, ledger: Ledger) -> LargeModel:
    """Return a client, not yet connected, for the server at the address."""
    from mlxroute.large import LargeModel

    key = read_key(settings, os.environ)
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
            if folder.is_absolute() and (folder / "tokenizer.json").is_file():
                tokenizer = _load_tokenizer(folder, name, cache_dir)
                if tokenizer is not None:
                    return tokenizer
        return None

    return find


def _load_tokenizer(folder: Path, name: str, cache_dir: Path) -> ChatTokenizer | None:
    from mlxroute.backend import blas

    # Importing the tokenizer imports MLX, which must find the faster BLAS.
    blas.interpose(cache_dir)
    from mlxroute.tokenizers.chat_template import ChatTokenizer

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
