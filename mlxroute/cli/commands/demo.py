"""`demo`: fetch two models, serve the large one here, and let both and each alone answer."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mlxroute.cli.exit_codes import EXIT_INTERRUPTED
from mlxroute.cli.folders import cache_dir_of, find_bench_file, host_log
from mlxroute.cli.setting_options import replace_undecodable
from mlxroute.config import Settings, read_never_send, user_catalog_dir
from mlxroute.errors import SourceUnreachable, UsageError, WeightsError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.catalog import Catalog, Pair
    from mlxroute.cli.model_fit import Machine
    from mlxroute.ledger import Ledger
    from mlxroute.questions.demo_question import DemoQuestion
    from mlxroute.weights import LocalModel

_THREADS_VARIABLE: Final = "OPENBLAS_NUM_THREADS"


def demo(
    settings: Settings,
    question: Annotated[
        str | None,
        typer.Option(help="Ask this instead of the demo's question.", metavar="TEXT"),
    ] = None,
) -> int:
    """Fetch two models; answer a question with the small one, with both and with the large one."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.large_setup import open_ledger
    from mlxroute.cli.model_fit import demo_pairs, measure_machine
    from mlxroute.cli.small_setup import default_small
    from mlxroute.cli.terminal import make_consoles

    out, err = make_consoles()
    demo_question = _choose_question(question)
    never_send = read_never_send(settings)
    catalog = Catalog.load(user_catalog_dir())
    leave_a_core_to_the_server()
    machine = measure_machine(settings)
    pairs = demo_pairs(catalog, machine, small=default_small())
    with open_ledger(settings) as ledger:
        pair, large_weights = _fetch_pair(pairs, catalog, machine, settings, err)
        return _serve_and_answer(
            pair,
            large_weights,
            demo_question,
            settings,
            out,
            err,
            ledger=ledger,
            never_send=never_send,
        )


def leave_a_core_to_the_server() -> None:
    """Let the small model's BLAS use all cores but one, unless the user has set their number.

    Threads of OpenBLAS spin while they wait for each other, so one busy core slows all of them.
    """
    os.environ.setdefault(_THREADS_VARIABLE, str(max(1, (os.cpu_count() or 1) - 1)))


def _choose_question(text: str | None) -> DemoQuestion:
    """Return the user's question, else the demo's. Raises UsageError for an empty one."""
    from mlxroute.questions.demo_question import DemoQuestion, read_demo_question

    if text is None:
        return read_demo_question(find_bench_file("questions", "demo.json"))
    if not text.strip():
        raise UsageError("the question is empty", parameter="question")
    return DemoQuestion(str(replace_undecodable(text)))


def _fetch_pair(
    pairs: list[Pair], catalog: Catalog, machine: Machine, settings: Settings, err: Console
) -> tuple[Pair, LocalModel]:
    """Fetch the first pair whose sources are reachable, offline the first that is cached.

    Returns it with the large weights.
    """
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.hosting.server_choice import check_llama_cpp
    from mlxroute.weights import resolve

    failure: WeightsError | None = None
    for number, pair in enumerate(pairs, start=1):
        err.print(f"models: {pair.small} here, {pair.large} as the large one")
        as_gguf = machine.serves_gguf(pair.large, catalog)
        if as_gguf:
            check_llama_cpp()
        try:
            with ByteProgress(err) as progress:
                for name, in_gguf in ((pair.small, False), (pair.large, as_gguf)):
                    local = resolve(
                        name,
                        as_gguf=in_gguf,
                        catalog=catalog,
                        cache_dir=cache_dir_of(settings),
                        offline=settings.offline,
                        progress=progress.progress,
                        notify=progress.notify,
                    )
        except WeightsError as exc:
            if not isinstance(exc, SourceUnreachable) and exc.parameter != "offline":
                raise
            failure = failure or exc
            if number < len(pairs):
                err.print(f"{exc}; trying the next pair", style="yellow")
        else:
            return pair, local
    raise failure or SourceUnreachable("the catalogue names no pair")


def _serve_and_answer(
    pair: Pair,
    large_weights: LocalModel,
    question: DemoQuestion,
    settings: Settings,
    out: Console,
    err: Console,
    *,
    ledger: Ledger,
    never_send: tuple[re.Pattern[str], ...],
) -> int:
    from mlxroute.cli.demo_story import tell_story
    from mlxroute.cli.large_setup import make_tokenizer_finder
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.routing import make_routing
    from mlxroute.cli.session import Session
    from mlxroute.cli.small_setup import load_small
    from mlxroute.cli.terminal import print_note
    from mlxroute.hosting.launcher import LocalServer
    from mlxroute.large import LargeModel

    settings = _demo_settings(settings, pair)
    cache_dir = cache_dir_of(settings)
    with (
        LocalServer.launch(
            large_weights.path,
            cache_dir=cache_dir,
            log_path=host_log(cache_dir),
            skip_memory_check=settings.skip_memory_check,
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
        routing = make_routing(small, large, settings, pair)
        session = Session(
            small, large, settings, routing=routing, ledger=ledger, never_send=never_send
        )
        try:
            return tell_story(session, pair, question, heat=settings.heat, out=out, err=err)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED


def _demo_settings(settings: Settings, pair: Pair) -> Settings:
    """Return the settings for the demo's own models, with those of the user that apply to them."""
    from mlxroute.cli.demo_story import MAX_TOKENS

    return Settings(
        small=pair.small,
        max_tokens=MAX_TOKENS,
        cache_dir=settings.cache_dir,
        heat=settings.heat,
        offline=settings.offline,
        skip_memory_check=settings.skip_memory_check,
        timeout=settings.timeout,
        ledger=settings.ledger,
        threshold=settings.threshold,
        budget=settings.budget,
    )
