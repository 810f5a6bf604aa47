"""`demo`: a small model, a large one on a real server, and an answer that uses both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.catalog import Catalog, Pair
from mlxroute.cli.commands.host import device_room, host_log
from mlxroute.cli.folders import cache_dir_of
from mlxroute.cli.model_fit import demo_pairs
from mlxroute.config import Settings, read_never_send, user_catalog_dir
from mlxroute.errors import SourceUnreachable, WeightsError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.cli.session import Session
    from mlxroute.weights import LocalModel

QUESTION = "Explain the difference between a list and a tuple in Python in two sentences."
_MAX_TOKENS = 160


def run_demo(settings: Settings) -> int:
    """Fetch, serve, ask, explain. Returns 0, or 130 when interrupted."""
    from mlxroute.cli.terminal import consoles

    out, err = consoles()
    cache_dir = cache_dir_of(settings.cache_dir)
    catalog = Catalog.load(user_catalog_dir())
    dense, available = device_room(cache_dir)
    pairs = demo_pairs(catalog, available=available, dense=dense)
    pair, large = _fetch(pairs, catalog, settings, cache_dir, err)
    return _answer(pair, large, settings, cache_dir, out, err)


def _fetch(
    pairs: list[Pair], catalog: Catalog, settings: Settings, cache_dir: Path, err: Console
) -> tuple[Pair, LocalModel]:
    """Have the best pair on disk whose sources can be reached."""
    from mlxroute.cli.progress import Reporter
    from mlxroute.weights import resolve

    failure: WeightsError = SourceUnreachable("the catalogue names no pair")
    for pair in pairs:
        err.print(f"models: {pair.small} here, {pair.large} as the large one", markup=False)
        try:
            with Reporter(err) as reporter:
                for name in (pair.small, pair.large):
                    local = resolve(
                        name,
                        catalog=catalog,
                        cache_dir=cache_dir,
                        offline=settings.offline,
                        progress=reporter.progress,
                        notify=reporter.notify,
                    )
        except SourceUnreachable as exc:
            err.print(f"{exc}; trying the next pair", style="yellow", markup=False)
            failure = exc
        else:
            return pair, local
    raise failure


def _answer(
    pair: Pair,
    large_weights: LocalModel,
    settings: Settings,
    cache_dir: Path,
    out: Console,
    err: Console,
) -> int:
    from mlxroute.cli.large_side import tokenizer_finder
    from mlxroute.cli.progress import Reporter
    from mlxroute.cli.session import (
        Session,
        chosen_router,
        load_small,
        open_ledger,
        ranks_of,
        router_of,
    )
    from mlxroute.hosting.launcher import LocalServer
    from mlxroute.large import LargeModel

    never_send = read_never_send(settings)
    settings = Settings(
        small=pair.small,
        max_tokens=_MAX_TOKENS,
        cache_dir=settings.cache_dir,
        heat=settings.heat,
        offline=settings.offline,
        ledger=settings.ledger,
        threshold=settings.threshold,
        budget=settings.budget,
    )
    with (
        open_ledger(settings) as ledger,
        LocalServer.launch(
            large_weights.path, cache_dir=cache_dir, log_path=host_log(cache_dir)
        ) as server,
        LargeModel(
            server.url,
            timeout_s=settings.timeout,
            ledger=ledger,
            find_tokenizer=tokenizer_finder(settings, server.url),
        ) as large,
    ):
        with Reporter(err) as reporter:
            # Both models load at the same time, each in its own process.
            small = load_small(settings, reporter)
            server.wait_until_ready(progress=reporter.progress)
        # A server started here for this once is not worth a long examination.
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        err.print(f"{pair.large} is served at {server.url}", style="dim", markup=False)
        name = router_of(settings, pair)
        ranks = ranks_of(small, name)
        session = Session(
            small,
            large,
            settings,
            router=chosen_router(name, settings, pair, ranks),
            ranks=ranks,
            ledger=ledger,
            never_send=never_send,
        )
        return _show(session, pair, out, err)


def _show(session: Session, pair: Pair, out: Console, err: Console) -> int:
    """The question, the answer as it is written, and what to make of it."""
    from mlxroute.cli.run import show_live
    from mlxroute.cli.terminal import write_plain
    from mlxroute.view import closing_paragraph

    err.print(f"\n> {QUESTION}\n", style="bold", markup=False)
    answer = session.answer([{"role": "user", "content": QUESTION}])
    if out.is_terminal:
        code = show_live(answer, session, out, err)
    else:
        code = write_plain(answer, stream=sys.stdout, err=err)
    stats = answer.stats()
    err.print()
    err.print(
        closing_paragraph(
            stats,
            small=pair.small,
            large=pair.large,
            threshold=session.threshold,
            allowance=session.allowance,
        ),
        markup=False,
    )
    return code
