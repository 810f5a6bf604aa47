"""The flags that commands share, as typer takes them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlxroute.config import parse_share
from mlxroute.errors import ConfigError
from mlxroute.types import Mode


class RouterName(StrEnum):
    """What decides where the large model is asked."""

    ENTROPY = "entropy"
    MARGIN = "margin"
    MAX_PROBABILITY = "max-probability"
    LOGU = "logu"
    HEAD = "head"
    RANDOM = "random"


class DelayName(StrEnum):
    """How the time of a call varies."""

    CONSTANT = "constant"
    JITTERED = "jittered"
    HEAVY_TAILED = "heavy-tailed"
    LOSSY = "lossy"


class KernelName(StrEnum):
    """Which form of the logit kernel runs."""

    AUTO = "auto"
    METAL = "metal"
    GRAPH = "graph"


def _threshold(text: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a number, inf or -inf") from exc


def budget_option(text: str) -> float:
    try:
        return parse_share(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc


Small = Annotated[
    str | None,
    typer.Option(help="Small model: catalogue name, folder, .gguf file or hub id.", metavar="NAME"),
]
Large = Annotated[
    str | None, typer.Option(help="Large model's server, e.g. http://host:8000/v1.", metavar="URL")
]
LargeModelId = Annotated[
    str | None, typer.Option(help="Which of the server's models.", metavar="ID")
]
Adapter = Annotated[
    str | None, typer.Option(help="Folder of LoRA weights for the small model.", metavar="DIR")
]
Router = Annotated[RouterName | None, typer.Option(help="What decides where to ask.")]
HeadFile = Annotated[
    str | None,
    typer.Option("--head", help="The head of `--router head`, from `train`.", metavar="FILE"),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        parser=_threshold,
        metavar="X",
        help="Ask above this score; inf never, -inf always. Default: the pair's own, of entropy.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        parser=budget_option,
        metavar="SHARE",
        help="Ask at no more than this share of the tokens, e.g. 7%, where it matters most.",
    ),
]
ModeOption = Annotated[
    Mode | None,
    typer.Option(help="Stand still while the large model is asked, or decode on; same answer."),
]
Prefetch = Annotated[
    int | None,
    typer.Option(help="Tokens that a call brings beyond the one asked for.", metavar="N"),
]
CallCeiling = Annotated[
    float | None,
    typer.Option(help="At most so many calls an escalated position; 1.5 with prices.", metavar="X"),
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", metavar="N")]
Temperature = Annotated[
    float | None, typer.Option(help="Of the small model's own tokens; 0 is greedy.", metavar="T")
]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling, 0 to 1.", metavar="P")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", metavar="N")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeatable.", metavar="TEXT"),
]
System = Annotated[str | None, typer.Option(help="System prompt.", metavar="TEXT")]
Kernel = Annotated[
    KernelName | None, typer.Option(help="Form of the logit kernel; auto takes what works.")
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds a call, and all faults of an answer, may take.", metavar="S"),
]
KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable holding the server's key.", metavar="VARIABLE"),
]
KeyFile = Annotated[
    str | None, typer.Option(help="File (mode 0600) holding the server's key.", metavar="FILE")
]
CaBundle = Annotated[
    str | None,
    typer.Option(
        help="PEM file of the authorities to trust instead of the public ones.", metavar="FILE"
    ),
]
CacheDir = Annotated[str | None, typer.Option(help="Where weights are kept.", metavar="DIR")]
LedgerFile = Annotated[
    str | None,
    typer.Option("--ledger", help="Write every request body sent to this file.", metavar="FILE"),
]
NeverSend = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep positions local whose context this regular expression matches; repeatable.",
        metavar="PATTERN",
    ),
]
NeverSendFile = Annotated[
    list[str] | None,
    typer.Option(help="File with one such pattern per line; repeatable.", metavar="FILE"),
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Open no socket at all.")]
Strict = Annotated[
    bool | None, typer.Option("--strict", help="Stop with exit code 3 when the large side fails.")
]
Heat = Annotated[bool | None, typer.Option("--heat", help="Shade every token by its entropy.")]
Examples = Annotated[
    Path | None, typer.Option(help="Rows with a `cot`: worked examples.", metavar="FILE")
]
Shots = Annotated[int, typer.Option(help="How many worked examples.", min=0)]
AtOnce = Annotated[int, typer.Option(help="Calls under way at once, at most.", min=1)]
