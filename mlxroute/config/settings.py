"""Every setting, declared once.

A field of `Settings` is the only place where a setting is declared. Its flag (`--max-tokens`), its
environment variable (`MLXROUTE_MAX_TOKENS`), its key in the config file (`max_tokens`) and its row
in docs/settings.md follow from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from mlxroute.config.setting_choices import EngineName, KernelName, RouterName, ToolPolicyName
from mlxroute.errors import ConfigError
from mlxroute.types import Mode

_VARIABLE_PREFIX = "MLXROUTE_"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

# Groups of commands that take the same flags.
_ANSWERS = ("chat", "ask")
_ROUTED = (*_ANSWERS, "serve")
_OWN_SMALL = (*_ROUTED, "calibrate", "bench speed")
_ALL_SMALL = (*_OWN_SMALL, "train", "adapt", "bench latency", "bench quality")
_LEDGERED = (*_ROUTED, "train", "adapt", "probe", "doctor")
_OWN_SERVER = (*_LEDGERED, "bench latency", "bench quality")
_OFFLINE = (*_OWN_SMALL, "pull", "probe", "doctor")
_EVERYWHERE = (
    *(*_ALL_SMALL, "replay", "demo", "models", "pull", "host", "probe", "doctor"),
    "bench kernels",
)

_Value = TypeVar("_Value")


def _setting(
    default: _Value,
    text: str,
    *,
    metavar: str | None = None,
    commands: Sequence[str] = (),
    variable: str | None = None,
    choices: type[StrEnum] | None = None,
    form: Literal["share", "unbounded", "escapes"] | None = None,
) -> _Value:
    """Declare a setting.

    Args:
        default: Its value where no source sets it.
        text: Its help.
        metavar: Placeholder for its value in the help. None (default) for typer's own.
        commands: Commands that take its flag. Empty (default) for a setting of the config file and
            the environment only.
        variable: A second environment variable, read if its own is not set. None by default.
        choices: Values that it accepts. None (default) for any of its type.
        form: How it may be written beside the form of its type, which is all by default (None): a
            share as `7%` or `0.07`, an unbounded number as inf or -inf, or a text with the escapes
            `\\n`, `\\t` and `\\\\`, as in TOML.
    """
    metadata = {
        "help": text,
        "metavar": metavar,
        "commands": tuple(commands),
        "second_variable": variable,
        "choices": choices,
        "is_share": form == "share",
        "is_unbounded": form == "unbounded",
        "has_escapes": form == "escapes",
    }
    return field(default=default, metadata=metadata)


# They describe the large model's server: another one does not inherit them.
SERVER_SETTINGS = ("large_model", "price_input", "price_cached_input", "price_output")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one run. None means not set: a default applies where the value is used.

    Two fields are not settings: `key_server` is the server that the key is meant for, if known, and
    `origins` is where the config file or the environment set a value, in words, by setting.
    """

    small: str | None = _setting(
        None,
        "Small model: catalogue name, folder, .gguf file or hub id. Default: qwen2.5-0.5b on a Mac,"
        " else qwen2.5-coder-0.5b.",
        metavar="NAME",
        commands=_ALL_SMALL,
    )
    large: str | None = _setting(
        None,
        "Server of the large model, e.g. http://host:8000/v1.",
        metavar="URL",
        commands=(*_ROUTED, "train", "adapt", "doctor", "bench latency", "bench quality"),
        variable="OPENAI_BASE_URL",
    )
    large_model: str | None = _setting(
        None,
        "Model to use if the server has several.",
        metavar="ID",
        commands=_OWN_SERVER,
    )
    adapter: str | None = _setting(
        None,
        "Folder with LoRA weights for the small model.",
        metavar="DIR",
        commands=_ALL_SMALL,
    )
    router: str | None = _setting(
        None,
        "Score that decides where the large model is asked. Default: head with --head, else the"
        " pair's, else entropy.",
        commands=_ROUTED,
        choices=RouterName,
    )
    head: str | None = _setting(
        None,
        "Learned head to route by, as written by `train`.",
        metavar="FILE",
        commands=(*_ROUTED, "replay", "train", "bench quality"),
    )
    threshold: float | None = _setting(
        None,
        "Ask the large model above this score, in place of a budget; inf never asks, -inf always.",
        metavar="X",
        commands=(*_ROUTED, "demo"),
        form="unbounded",
    )
    budget: float | None = _setting(
        None,
        "Ask the large model for at most this share of the tokens, plus 4. Default: 7%, unless a"
        " threshold is set.",
        metavar="SHARE",
        commands=(*_ROUTED, "train", "demo"),
        form="share",
    )
    mode: str = _setting(
        "auto",
        "What the small model does during a call; same replies give the same text in every mode.",
        commands=_ROUTED,
        choices=Mode,
    )
    prefetch: int | None = _setting(
        None,
        "Extra tokens to request with each call, from 0 to 64. Default: 0; `auto` tries 16.",
        metavar="N",
        commands=_ROUTED,
    )
    call_ceiling: float | None = _setting(
        None,
        "Maximum calls per escalated token. Default: none; 1.5 in mode auto if prices are set; 1 on"
        " a server that only chats.",
        metavar="X",
        commands=_ROUTED,
    )
    accept_within: float = _setting(
        0.0,
        "Keep the small model's token if the large one finds it at most X nats less likely.",
        metavar="X",
        commands=(*_ROUTED, "bench quality"),
    )
    kernel: str = _setting(
        "auto",
        "Implementation of the logit kernel.",
        commands=(*_OWN_SMALL, "replay"),
        choices=KernelName,
    )
    engine: str = _setting(
        "auto",
        "Program that serves the large model. `auto`: llama.cpp for a model with a GGUF file if MLX"
        " has no GPU, else mlx_lm.server.",
        commands=("demo", "host"),
        choices=EngineName,
    )
    max_tokens: int = _setting(512, "Longest answer, in tokens.", metavar="N", commands=_ROUTED)
    temperature: float = _setting(
        0.0,
        "Sampling temperature of the small model; below 0.001 it is greedy.",
        metavar="T",
        commands=_ROUTED,
    )
    top_p: float = _setting(
        1.0,
        "Nucleus sampling of the small model: probability mass to keep; below 0.001 it is greedy.",
        metavar="P",
        commands=_ROUTED,
    )
    seed: int | None = _setting(
        None, "Random seed, for repeatable sampling.", metavar="N", commands=_ROUTED
    )
    stop: tuple[str, ...] = _setting(
        (),
        "End the answer before this text; \\n is a line break, \\t a tab and \\\\ a backslash;"
        " repeatable.",
        metavar="TEXT",
        commands=_ANSWERS,
        form="escapes",
    )
    system: str | None = _setting(None, "System prompt.", metavar="TEXT", commands=_ANSWERS)
    timeout: float = _setting(
        30.0,
        "Time limit of a call, in seconds, and of all failed calls of an answer together; at least"
        " 600 in train, adapt and bench quality.",
        metavar="S",
        commands=(*_LEDGERED, "bench quality"),
    )
    key_env: str | None = _setting(
        None,
        "Environment variable that holds the server's key. Default: OPENAI_API_KEY.",
        metavar="VARIABLE",
        commands=_OWN_SERVER,
    )
    key_file: str | None = _setting(
        None,
        "File that holds the server's key; mode 0600.",
        metavar="FILE",
        commands=_OWN_SERVER,
    )
    ca_bundle: str | None = _setting(
        None,
        "PEM file of certificate authorities to trust instead of the public ones.",
        metavar="FILE",
        commands=_OWN_SERVER,
    )
    cache_dir: str | None = _setting(
        None, "Folder for model weights.", metavar="DIR", commands=_EVERYWHERE
    )
    ledger: str | None = _setting(
        None,
        "Append every request body to this file before it is sent.",
        metavar="FILE",
        commands=_LEDGERED,
    )
    never_send: tuple[str, ...] = _setting(
        (),
        "Stop asking the large model once the context matches this regular expression; repeatable.",
        metavar="PATTERN",
        commands=_ROUTED,
    )
    never_send_file: tuple[str, ...] = _setting(
        (),
        "File with one --never-send pattern per line; repeatable.",
        metavar="FILE",
        commands=_ROUTED,
    )
    host: str = _setting(
        "127.0.0.1",
        "Address to listen on. One that other machines can reach needs a key for clients.",
        metavar="ADDRESS",
        commands=("serve",),
    )
    port: int = _setting(8787, "Port to listen on.", metavar="N", commands=("serve",))
    client_key_env: str | None = _setting(
        None,
        "Environment variable that holds the key that clients must send.",
        metavar="VARIABLE",
        commands=("serve",),
    )
    client_key_file: str | None = _setting(
        None,
        "File with the keys of clients, one per line, # for comments; mode 0600.",
        metavar="FILE",
        commands=("serve",),
    )
    allow_host: tuple[str, ...] = _setting(
        (),
        "Another host name by which clients call the endpoint; repeatable.",
        metavar="NAME",
        commands=("serve",),
    )
    allow_origin: tuple[str, ...] = _setting(
        (),
        "Origin of web pages that may call the endpoint, e.g. http://localhost:3000; repeatable.",
        metavar="ORIGIN",
        commands=("serve",),
    )
    tools: str = _setting(
        "refuse",
        "What to do with requests that have tools or a schema: refuse them, or have the large model"
        " answer them alone.",
        commands=("serve",),
        choices=ToolPolicyName,
    )
    max_running: int = _setting(8, "Answers to decode at a time.", metavar="N", commands=("serve",))
    max_queued: int = _setting(
        32, "Maximum number of answers that wait in the queue.", metavar="N", commands=("serve",)
    )
    cache_memory: float = _setting(
        1.0,
        "Memory in GB for the KV caches of earlier prompts.",
        metavar="GB",
        commands=("serve",),
    )
    price_input: float | None = _setting(None, "Price of a million input tokens.")
    price_cached_input: float | None = _setting(
        None, "Price of a million input tokens from the server's cache. Default: `price_input`."
    )
    price_output: float | None = _setting(None, "Price of a million output tokens.")
    skip_memory_check: bool = _setting(
        False,
        "Load models even if they seem too large for the free memory.",
        commands=(*_ALL_SMALL, "demo", "host"),
    )
    offline: bool = _setting(False, "Make no network connection.", commands=_OFFLINE)
    strict: bool = _setting(
        False, "Fail if the large model fails: exit code 3, or status 502.", commands=_ROUTED
    )
    heat: bool = _setting(
        False, "Shade every token by its entropy.", commands=(*_ANSWERS, "replay", "demo")
    )
    key_server: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """A declared setting, from which flags, environment variables and documentation are made.

    Args:
        name: Name of the field of `Settings`, and its key in the config file.
        kind: bool, int, float, str, or tuple for a list of texts.
        default: Value where no source sets it.
        help: Help text of its flag.
        metavar: Placeholder for its value in the help; None for typer's own.
        commands: Commands that take its flag.
        variables: Environment variables to read; the first that is present counts.
        choices: Values that it accepts; None for any of its type.
        is_share: Whether it may be written as `7%` or `0.07`.
        is_unbounded: Whether it may be inf or -inf.
        has_escapes: Whether `\\n`, `\\t` and `\\\\` stand for other characters, as they do in TOML.
    """

    name: str
    kind: type
    default: Any
    help: str
    metavar: str | None
    commands: tuple[str, ...]
    variables: tuple[str, ...]
    choices: type[StrEnum] | None
    is_share: bool
    is_unbounded: bool
    has_escapes: bool

    @property
    def flag(self) -> str:
        """The option that sets it on the command line."""
        return f"--{self.name.replace('_', '-')}"


@cache
def declared_settings() -> dict[str, Setting]:
    """Return all settings by name, in the order of their declaration."""
    annotations = get_type_hints(Settings)
    settings = {}
    for item in fields(Settings):
        if not (metadata := dict(item.metadata)):
            continue
        own, second = f"{_VARIABLE_PREFIX}{item.name.upper()}", metadata.pop("second_variable")
        settings[item.name] = Setting(
            name=item.name,
            kind=_kind(annotations[item.name]),
            default=item.default,
            variables=(own, second) if second else (own,),
            **metadata,
        )
    return settings


def _kind(annotation: Any) -> type:
    """Return the type of a value that is set: `float` for `float | None`."""
    if isinstance(annotation, UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not type(None))
    return tuple if get_args(annotation) else annotation


def replace_escapes(text: str) -> str:
    """Return a text with a line break, a tab and a backslash for `\\n`, `\\t` and `\\\\`."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)


def parse_share(text: str) -> float:
    """Parse a share as people write it, `7%` or `0.07`. Raises ConfigError."""
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"{text!r} is not a share from 0% to 100%; write 7% or 0.07")
    return value
