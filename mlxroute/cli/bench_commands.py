"""The typer commands of `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxroute.cli.flags import (
    Adapter,
    AtOnce,
    CacheDir,
    DelayName,
    Examples,
    HeadFile,
    Kernel,
    Large,
    LargeModelId,
    Offline,
    RouterName,
    Shots,
    Small,
    Timeout,
    budget_option,
)

app = typer.Typer(rich_markup_mode=None, help="Measure, beside baselines in the same run.")
Save = Annotated[bool, typer.Option("--save", help="Also write the report to bench/results/.")]


@app.command()
def speed(
    small: Small = None,
    pairs: Annotated[int, typer.Option(help="Answers of each side.", min=1)] = 10,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 128,
    save: Save = False,
    adapter: Adapter = None,
    kernel: Kernel = None,
    cache_dir: CacheDir = None,
    offline: Offline = None,
) -> None:
    """Decoding that never escalates, beside mlx_lm; `--small random` is a tiny model."""
    from mlxroute.cli.commands.bench import run_bench_speed
    from mlxroute.cli.run import settings_from

    settings = settings_from(locals())
    raise typer.Exit(run_bench_speed(settings, pairs=pairs, tokens=tokens, save=save))


@app.command()
def latency(
    large: Large = None,
    large_model: LargeModelId = None,
    small: Small = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines of questions; default: 20 prompts of ours.", metavar="FILE"),
    ] = None,
    examples: Examples = None,
    shots: Shots = 4,
    prompts: Annotated[int, typer.Option(help="How many answers.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 96,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Time of a call, in steps of the small model.")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Share of the positions that are escalated.")
    ] = None,
    delay: Annotated[
        DelayName, typer.Option(help="How the call time varies.")
    ] = DelayName.CONSTANT,
    play: Annotated[
        bool, typer.Option("--play", help="Wait for nothing: play it on a virtual clock alone.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a picture; needs mlxroute[plot].", metavar="PNG")
    ] = None,
    save: Save = False,
    cache_dir: CacheDir = None,
) -> None:
    """Every mode before a server whose answers are kept and take a set time."""
    from mlxroute.bench.latency import LatencyGrid
    from mlxroute.cli.commands.bench import run_bench_latency
    from mlxroute.cli.run import settings_from

    settings = settings_from(
        {"large": large, "large_model": large_model, "small": small, "cache_dir": cache_dir}
    )
    ratios, rates = ratio or (4.0, 12.0, 34.0, 180.0), rate or (0.03, 0.07, 0.15)
    grid = LatencyGrid(tokens, ratios, rates, delay, measure=not play)
    code = run_bench_latency(
        settings,
        prompts=prompts,
        data=data,
        examples=examples,
        shots=shots,
        grid=grid,
        plot=plot,
        save=save,
    )
    raise typer.Exit(code)


@app.command()
def quality(
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines of questions and answers; default: ours.", metavar="FILE"),
    ] = None,
    large: Large = None,
    large_model: LargeModelId = None,
    small: Small = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(parser=budget_option, metavar="SHARE", help="Repeatable. Default: 1% to 30%."),
    ] = None,
    router: Annotated[
        list[RouterName] | None, typer.Option(help="Repeatable. Default: entropy and random.")
    ] = None,
    head: HeadFile = None,
    questions: Annotated[int, typer.Option(help="At most so many, by chance.", min=1)] = 300,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = 4,
    chats: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 4,
    at_once: AtOnce = 4,
    oracles: Annotated[
        bool, typer.Option("--oracles", help="Also what routers could reach that know it all.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a picture; needs mlxroute[plot].", metavar="PNG")
    ] = None,
    save: Save = False,
    timeout: Timeout = None,
    cache_dir: CacheDir = None,
) -> None:
    """Accuracy of both models alone and of routed answers; goes on where it was interrupted."""
    from mlxroute.bench.quality import BUDGETS, make_sides
    from mlxroute.cli.commands.bench_quality import QualityOptions, run_bench_quality
    from mlxroute.cli.run import settings_from

    settings = settings_from(
        {
            "large": large,
            "large_model": large_model,
            "small": small,
            "cache_dir": cache_dir,
            "max_tokens": tokens,
            "head": head,
            "timeout": timeout,
        }
    )
    budgets = budget or BUDGETS
    names = [name.value for name in router or (RouterName.ENTROPY, RouterName.RANDOM)]
    options = QualityOptions(data, examples, shots, questions, chats, at_once, oracles, plot, save)
    raise typer.Exit(run_bench_quality(settings, make_sides(names, budgets), options))


@app.command()
def kernels(
    rounds: Annotated[int, typer.Option(help="Timings of each form.", min=1)] = 30,
    save: Save = False,
    cache_dir: CacheDir = None,
) -> None:
    """The logit kernel beside the plain chain of operations: time, and error to float64."""
    from mlxroute.cli.commands.bench import run_bench_kernels
    from mlxroute.cli.run import settings_from

    settings = settings_from({"cache_dir": cache_dir})
    raise typer.Exit(run_bench_kernels(settings, rounds=rounds, save=save))
