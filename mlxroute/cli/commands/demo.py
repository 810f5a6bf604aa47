"""`demo`: fetch two models, serve the large one here, and show an answer by both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of, host_log
from mlxroute.config import Settings, read_never_send, user_catalog_dir
from mlxroute.errors import SourceUnreachable, WeightsError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.catalog import Catalog, Pair
    from mlxroute.cli.session import Session
    from mlxroute.weights import LocalModel

QUESTION = "Explain the difference between a list and a tuple in Python in two sentences."
_MAX_TOKENS = 160


def demo(settings: Settings) -> int:
    """Fetch two models and watch an answer being routed."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.model_fit import demo_pairs, measure_machine
    from mlxroute.cli.small_setup import default_small
    from mlxroute.cli.terminal import make_consoles

    out, err = make_consoles()
    catalog = Catalog.load(user_catalog_dir())
    dense, available = measure_machine(cache_dir_of(settings))
    pairs = demo_pairs(catalog, small=default_small(), available=available, dense=dense)
    pair, large_weights = _fetch_pair(pairs, catalog, settings, err)
    return _serve_and_answer(pair, large_weights, settings, out, err)


def _fetch_pair(
    pairs: list[Pair], catalog: Catalog, settings: Settings, err: Console
) -> tuple[Pair, LocalModel]:
    """Fetch the first pair whose sources are reachable; return it with the large weights."""
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.weights import resolve

    failure: WeightsError = SourceUnreachable("the catalogue names no pair")
    for pair in pairs:
        err.print(f"models: {pair.small} here, {pair.large} as the large one", markup=False)
        try:
            with ByteProgress(err) as progress:
                for name in (pair.small, pair.large):
                    local = resolve(
                        name,
                        catalog=catalog,
                        cache_dir=cache_dir_of(settings),
                        offline=settings.offline,
                        progress=progress.progress,
                        notify=progress.notify,
                    )
        except SourceUnreachable as exc:
            err.print(f"{exc}; trying the next pair", style="yellow", markup=False)
            failure = exc
        else:
            return pair, local
    raise failure


def _serve_and_answer(
    pair: Pair, large_weights: LocalModel, settings: Settings, out: Console, err: Console
) -> int:
    from mlxroute.cli.large_setup import make_tokenizer_finder, open_ledger
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.session import make_session
    from mlxroute.cli.small_setup import load_small
    from mlxroute.cli.terminal import print_note
    from mlxroute.hosting.launcher import LocalServer
    from mlxroute.large import LargeModel

    never_send = read_never_send(settings)
    settings = _demo_settings(settings, pair)
    cache_dir = cache_dir_of(settings)
    with (
        open_ledger(settings) as ledger,
        LocalServer.launch(
            large_weights.path, cache_dir=cache_dir, log_path=host_log(cache_dir)
        ) as server,
        LargeModel(
            server.url,
            timeout_s=settings.timeout,
            ledger=ledger,
            find_tokenizer=make_tokenizer_finder(settings, server.url),
        ) as large,
    ):
        with ByteProgress(err) as progress:
            # Both models load at the same time, each in its own process.
            small = load_small(settings, progress)
            server.wait_until_ready(progress=progress.progress)
        # A full probe takes longer than it saves for one answer.
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        print_note(err, f"{pair.large} is served at {server.url}")
        session = make_session(
            small, large, settings, pair=pair, ledger=ledger, never_send=never_send
        )
        return _show(session, pair, settings, out, err)


def _demo_settings(settings: Settings, pair: Pair) -> Settings:
    """Return the settings for the demo's own models, with those of the user that apply to them."""
    return Settings(
        small=pair.small,
        max_tokens=_MAX_TOKENS,
        cache_dir=settings.cache_dir,
        heat=settings.heat,
        offline=settings.offline,
        ledger=settings.ledger,
        threshold=settings.threshold,
        budget=settings.budget,
    )


def _show(session: Session, pair: Pair, settings: Settings, out: Console, err: Console) -> int:
    """Show the question, the answer while it is written, and a paragraph about it."""
    from mlxroute.cli.terminal import show_answer
    from mlxroute.view import closing_paragraph

    threshold = session.routing.threshold
    err.print(f"\n> {QUESTION}\n", style="bold", markup=False)
    answer = session.answer([{"role": "user", "content": QUESTION}])
    code = show_answer(answer, heat=settings.heat, threshold=threshold, out=out, err=err)
    paragraph = closing_paragraph(
        answer.stats(),
        small=pair.small,
        large=pair.large,
        threshold=session.routing.threshold,
        allowance=session.routing.describe_budget(),
    )
    err.print()
    err.print(paragraph, markup=False)
    return code
