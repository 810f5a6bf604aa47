"""`probe`: find out what a server can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlxroute.cli.exit_codes import EXIT_LARGE_FAILED, EXIT_OK
from mlxroute.config import Settings
from mlxroute.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.large.negotiation.verdict_file import RejectedDialect, Verdict

_RUNGS = {
    1: "token ids in and out",
    2: "text in, ids or bytes out",
    3: "continued chat turn",
    4: "text only, no logprobs",
    5: "chat that goes on by example; approximate, not the model's own greedy answer",
}
_MARKS = {True: "yes", False: "no", None: "?"}


def probe(
    settings: Settings,
    large: Annotated[
        str, typer.Argument(help="The server, e.g. http://host:8000/v1.", metavar="URL")
    ],
) -> int:
    """Find out what a server can do, and in which dialect it is called."""
    if settings.offline:
        # Before any import: urllib3 opens a socket on import, to find out about IPv6.
        raise UsageError("--offline opens no connection, so there is nothing to probe")
    from mlxroute.cli.large_setup import (
        first_reply_status,
        make_large,
        model_notes,
        open_ledger,
    )
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.large.negotiation.prober import NoUsableDialect

    out, err = make_consoles()
    with open_ledger(settings) as ledger, make_large(settings, large, ledger, err) as model:
        try:
            title = "asking the server questions with known answers"
            with model_notes(model, err), first_reply_status(model, err, title):
                verdict = model.probe()
        except NoUsableDialect as exc:
            _print_rejected(out, exc.rejected)
            err.print(f"error: {model.base_url}: {exc}", soft_wrap=True)
            return EXIT_LARGE_FAILED
        sent = ledger.uploads
    _print_verdict(out, verdict, name=model.model_name)
    outcome = "is remembered" if model.is_verdict_saved else "could not be saved"
    text = f"{sent.requests} requests, {sent.size_bytes:,} bytes sent; the verdict {outcome}"
    print_note(err, text)
    return EXIT_OK


def _print_verdict(out: Console, verdict: Verdict, *, name: str) -> None:
    from mlxroute.cli.terminal import make_table, print_table
    from mlxroute.safe_text import printable

    length = verdict.context_length
    facts = {
        "model": name,
        "dialect": f"{verdict.dialect}: rung {verdict.rung} of 5, {_RUNGS[verdict.rung]}",
        "tokenizer": verdict.token_source or "unknown",
        "context": "unknown" if length is None else f"{length:,} tokens",
        "one token": f"p50 {verdict.latency_p50_s * 1e3:,.0f} ms,"
        f" p95 {verdict.latency_p95_s * 1e3:,.0f} ms",
    }
    for label, text in facts.items():
        out.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)
    out.print()
    table = make_table("capability", "", "observed", fold=True)
    for check in verdict.checks:
        table.add_row(check.name, _MARKS[check.passed], printable(check.detail))
    print_table(out, table)
    _print_rejected(out, verdict.rejected)


def _print_rejected(out: Console, rejected: tuple[RejectedDialect, ...]) -> None:
    from mlxroute.cli.terminal import make_table, print_table
    from mlxroute.safe_text import printable

    if not rejected:
        return
    out.print()
    table = make_table("refused", "why", fold=True)
    for dialect in rejected:
        table.add_row(dialect.dialect, printable(dialect.reason))
    print_table(out, table)
