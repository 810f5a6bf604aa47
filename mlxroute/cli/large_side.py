"""The large model of the settings: its client, its tokenizer where that lies here, the probe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.exit_codes import EXIT_LARGE_FAILED
from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings, read_key, user_catalog_dir
from mlxroute.errors import UsageError, WeightsError
from mlxroute.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxroute.large import LargeModel
    from mlxroute.large.negotiation.verdict_file import RejectedDialect, Verdict
    from mlxroute.tokenizers.chat_template import ChatTokenizer

_RUNGS = {
    1: "token ids in and out",
    2: "text in, ids or bytes out",
    3: "continued chat turn",
    4: "text only, no logprobs",
}
_MARKS = {True: "yes", False: "no", None: "?"}


def large_model(settings: Settings, address: str, ledger: Ledger) -> LargeModel:
    """The large model of the settings at this address, not yet connected."""
    from mlxroute.large import LargeModel

    key = read_key(settings, os.environ)
    return LargeModel(
        address,
        model=settings.large_model,
        api_key=key.reveal() if key else None,
        timeout_s=settings.timeout,
        ca_bundle=Path(settings.ca_bundle).expanduser() if settings.ca_bundle else None,
        ledger=ledger,
        verdicts=cache_dir_of(settings.cache_dir) / "endpoints.json",
        find_tokenizer=tokenizer_finder(settings, address),
    )


def tokenizer_finder(settings: Settings, address: str) -> Callable[[str], ChatTokenizer | None]:
    """Finds the tokenizer of a model by the name its server gives it, if its files are here."""

    def find(name: str) -> ChatTokenizer | None:
        from mlxroute.large.http.address import parse_address

        cache_dir = cache_dir_of(settings.cache_dir)
        folders = [Path(name)] if parse_address(address).is_loopback else []
        folders += _cached(name, cache_dir)
        for folder in folders:
            if folder.is_absolute() and (folder / "tokenizer.json").is_file():
                from mlxroute.backend import blas

                # The tokenizer's import brings MLX along, which must find the faster BLAS.
                blas.interpose(cache_dir)
                from mlxroute.tokenizers.chat_template import ChatTokenizer

                try:
                    return ChatTokenizer.load(folder, name=name)
                except WeightsError:
                    continue
        return None

    return find


def _cached(name: str, cache_dir: Path) -> list[Path]:
    """The folder of a catalogue model of this name or hub id, if it was fetched."""
    from mlxroute.catalog import Catalog
    from mlxroute.weights import list_cached

    names = {m.name for m in Catalog.load(user_catalog_dir()).models if name in (m.name, m.hub_id)}
    return [entry.path.absolute() for entry in list_cached(cache_dir) if entry.name in names]


def run_probe(address: str, settings: Settings) -> int:
    """Probe a server and print what was found; return 3 when nothing works."""
    if settings.offline:
        # Before any import: urllib3's opens a socket to see whether there is IPv6.
        raise UsageError("--offline opens no socket, so there is nothing to probe")
    from mlxroute.cli.session import open_ledger
    from mlxroute.cli.terminal import consoles
    from mlxroute.large.negotiation.prober import NoUsableDialect

    out, err = consoles()
    with open_ledger(settings) as ledger, large_model(settings, address, ledger) as large:
        try:
            with err.status("asking the server questions whose answers are known"):
                verdict = large.probe()
        except NoUsableDialect as exc:
            _print_refusals(out, exc.rejected)
            err.print(f"error: {large.base_url}: {exc}", markup=False, soft_wrap=True)
            return EXIT_LARGE_FAILED
        sent = ledger.uploads
    _print_verdict(out, verdict, name=large.model_name)
    err.print(
        f"{sent.requests} requests, {sent.size_bytes:,} bytes sent; the verdict is remembered",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _print_verdict(out: Console, verdict: Verdict, *, name: str) -> None:
    context = f"{verdict.context_length:,} tokens" if verdict.context_length else "not told"
    facts = {
        "model": name,
        "asked by": f"{verdict.dialect}: rung {verdict.rung} of 4, {_RUNGS[verdict.rung]}",
        "tokenizer": verdict.token_source or "not known",
        "context": context,
        "one token": f"p50 {verdict.latency_p50_s * 1e3:,.0f} ms,"
        f" p95 {verdict.latency_p95_s * 1e3:,.0f} ms",
    }
    for label, text in facts.items():
        out.print(f"{label:<10} {text}", markup=False, highlight=False, soft_wrap=True)
    out.print()
    table = _table("capability", "", "what was seen")
    for check in verdict.checks:
        table.add_row(check.name, _MARKS[check.passed], _plain(check.detail))
    out.print(table)
    _print_refusals(out, verdict.rejected)


def _print_refusals(out: Console, refusals: tuple[RejectedDialect, ...]) -> None:
    if not refusals:
        return
    out.print()
    table = _table("refused", "why")
    for refusal in refusals:
        table.add_row(refusal.dialect, _plain(refusal.reason))
    out.print(table)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _plain(text: str) -> str:
    """Text of a server, without control characters and without rich's markup."""
    from rich.markup import escape

    from mlxroute.safe_text import printable

    return escape(printable(text))
