"""Every setting, declared once.

A field of `Settings` is the only place where a setting is declared. Its flag (`--max-tokens`), its
environment variable (`MLXROUTE_MAX_TOKENS`), its key in the config file (`max_tokens`) and its row
in docs/settings.md follow from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from mlxroute.config.declarations import Setting, read_declarations, setting
from mlxroute.config.setting_choices import EngineName, KernelName, RouterName, ToolPolicyName
from mlxroute.errors import ConfigError
from mlxroute.types import Mode, Sampling

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

# They describe the large model's server: another one does not inherit them.
SERVER_SETTINGS = ("large_model", "price_input", "price_cached_input", "price_output")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one run. None means not set: a default applies where the value is used.

    Two fields are not settings: `key_server` is the server that the key is meant for, if known, and
    `origins` is where the config file or the environment set a value, in words, by setting.
    """

    small: str | None = setting(
        None,
        "Small model: catalogue name, folder, .gguf file or hub id. Default: qwen2.5-0.5b on a Mac,"
        " else qwen2.5-coder-0.5b.",
        metavar="NAME",
        commands=_ALL_SMALL,
    )
    large: str | None = setting(
        None,
        "Server of the large model, e.g. http://host:8000/v1.",
        metavar="URL",
        commands=(*_ROUTED, "train", "adapt", "doctor", "bench latency", "bench quality"),
        variable="OPENAI_BASE_URL",
    )
    large_model: str | None = setting(
        None,
        "Model to use if the server has several.",
        metavar="ID",
        commands=_OWN_SERVER,
    )
    adapter: str | None = setting(
        None,
        "Folder with LoRA weights for the small model.",
        metavar="DIR",
        commands=_ALL_SMALL,
    )
    router: str | None = setting(
        None,
        "Score that decides where the large model is asked. Default: head with --head, else the"
        " pair's, else entropy.",
        commands=_ROUTED,
        choices=RouterName,
    )
    head: str | None = setting(
        None,
        "Learned head to route by, as written by `train`.",
        metavar="FILE",
        commands=(*_ROUTED, "replay", "train", "bench quality"),
    )
    threshold: float | None = setting(
        None,
        "Ask the large model above this score, in place of a budget; inf never asks, -inf always.",
        metavar="X",
        commands=(*_ROUTED, "demo"),
        form="unbounded",
    )
    budget: float | None = setting(
        None,
        "Ask the large model for at most this share of the tokens, plus 4. Default: 7%, unless a"
        " threshold is set.",
        metavar="SHARE",
        commands=(*_ROUTED, "train", "demo"),
        form="share",
    )
    mode: str = setting(
        "auto",
        "What the small model does during a call; same replies give the same text in every mode.",
        commands=_ROUTED,
        choices=Mode,
    )
    prefetch: int | None = setting(
        None,
        "Extra tokens to request with each call, from 0 to 64. Default: 0; `auto` tries 16.",
        metavar="N",
        commands=_ROUTED,
    )
    call_ceiling: float | None = setting(
        None,
        "Maximum calls per escalated token. Default: none; 1.5 in mode auto if prices are set; 1 on"
        " a server that only chats.",
        metavar="X",
        commands=_ROUTED,
    )
    accept_within: float = setting(
        0.0,
        "Keep the small model's token if the large one finds it at most X nats less likely.",
        metavar="X",
        commands=(*_ROUTED, "bench quality"),
    )
    kernel: str = setting(
        "auto",
        "Implementation of the logit kernel.",
        commands=(*_OWN_SMALL, "replay"),
        choices=KernelName,
    )
    engine: str = setting(
        "auto",
        "Program that serves the large model. `auto`: llama.cpp for a model with a GGUF file if MLX"
        " has no GPU, else mlx_lm.server.",
        commands=("demo", "host"),
        choices=EngineName,
    )
    max_tokens: int = setting(512, "Longest answer, in tokens.", metavar="N", commands=_ROUTED)
    temperature: float = setting(
        0.0,
        "Sampling temperature of the small model; below 0.001 it is greedy.",
        metavar="T",
        commands=_ROUTED,
    )
    top_p: float = setting(
        1.0,
        "Nucleus sampling of the small model: probability mass to keep; below 0.001 it is greedy.",
        metavar="P",
        commands=_ROUTED,
    )
    top_k: int = setting(
        0,
        "Draw the small model's tokens from the N likeliest only; 0 sets no limit, 1 is greedy.",
        metavar="N",
        commands=_ROUTED,
    )
    min_p: float = setting(
        0.0,
        "Draw no token of the small model that is less than P times as likely as the likeliest.",
        metavar="P",
        commands=_ROUTED,
    )
    seed: int | None = setting(
        None, "Random seed, for repeatable sampling.", metavar="N", commands=_ROUTED
    )
    stop: tuple[str, ...] = setting(
        (),
        "End the answer before this text; \\n is a line break, \\t a tab and \\\\ a backslash;"
        " repeatable.",
        metavar="TEXT",
        commands=_ANSWERS,
        form="escapes",
    )
    system: str | None = setting(None, "System prompt.", metavar="TEXT", commands=_ANSWERS)
    timeout: float = setting(
        30.0,
        "Time limit of a call, in seconds, and of all failed calls of an answer together; at least"
        " 600 in train, adapt and bench quality.",
        metavar="S",
        commands=(*_LEDGERED, "bench quality"),
    )
    key_env: str | None = setting(
        None,
        "Environment variable that holds the server's key. Default: OPENAI_API_KEY.",
        metavar="VARIABLE",
        commands=_OWN_SERVER,
    )
    key_file: str | None = setting(
        None,
        "File that holds the server's key; mode 0600.",
        metavar="FILE",
        commands=_OWN_SERVER,
    )
    ca_bundle: str | None = setting(
        None,
        "PEM file of certificate authorities to trust instead of the public ones.",
        metavar="FILE",
        commands=_OWN_SERVER,
    )
    cache_dir: str | None = setting(
        None, "Folder for model weights.", metavar="DIR", commands=_EVERYWHERE
    )
    ledger: str | None = setting(
        None,
        "Append every request body to this file before it is sent.",
        metavar="FILE",
        commands=_LEDGERED,
    )
    never_send: tuple[str, ...] = setting(
        (),
        "Stop asking the large model once the context matches this regular expression; repeatable.",
        metavar="PATTERN",
        commands=_ROUTED,
    )
    never_send_file: tuple[str, ...] = setting(
        (),
        "File with one --never-send pattern per line; repeatable.",
        metavar="FILE",
        commands=_ROUTED,
    )
    host: str = setting(
        "127.0.0.1",
        "Address to listen on. One that other machines can reach needs a key for clients.",
        metavar="ADDRESS",
        commands=("serve",),
    )
    port: int = setting(8787, "Port to listen on.", metavar="N", commands=("serve",))
    client_key_env: str | None = setting(
        None,
        "Environment variable that holds the key that clients must send.",
        metavar="VARIABLE",
        commands=("serve",),
    )
    client_key_file: str | None = setting(
        None,
        "File with the keys of clients, one per line, # for comments; mode 0600.",
        metavar="FILE",
        commands=("serve",),
    )
    allow_host: tuple[str, ...] = setting(
        (),
        "Another host name by which clients call the endpoint; repeatable.",
        metavar="NAME",
        commands=("serve",),
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        "Origin of web pages that may call the endpoint, e.g. http://localhost:3000; repeatable.",
        metavar="ORIGIN",
        commands=("serve",),
    )
    tools: str = setting(
        "refuse",
        "What to do with requests that have tools or a schema: refuse them, or have the large model"
        " answer them alone.",
        commands=("serve",),
        choices=ToolPolicyName,
    )
    max_running: int = setting(8, "Answers to decode at a time.", metavar="N", commands=("serve",))
    max_queued: int = setting(
        32, "Maximum number of answers that wait in the queue.", metavar="N", commands=("serve",)
    )
    cache_memory: float = setting(
        1.0,
        "Memory in GB for the KV caches of earlier prompts.",
        metavar="GB",
        commands=("serve",),
    )
    price_input: float | None = setting(None, "Price of a million input tokens.")
    price_cached_input: float | None = setting(
        None, "Price of a million input tokens from the server's cache. Default: `price_input`."
    )
    price_output: float | None = setting(None, "Price of a million output tokens.")
    skip_memory_check: bool = setting(
        False,
        "Load models even if they seem too large for the free memory.",
        commands=(*_ALL_SMALL, "demo", "host"),
    )
    offline: bool = setting(False, "Make no network connection.", commands=_OFFLINE)
    strict: bool = setting(
        False, "Fail if the large model fails: exit code 3, or status 502.", commands=_ROUTED
    )
    heat: bool = setting(
        False, "Shade every token by its entropy.", commands=(*_ANSWERS, "replay", "demo")
    )
    key_server: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sampling(self) -> Sampling:
        """How the small model chooses its own tokens."""
        return Sampling(self.temperature, self.top_p, self.seed, top_k=self.top_k, min_p=self.min_p)


@cache
def declared_settings() -> dict[str, Setting]:
    """Return all settings by name, in the order of their declaration."""
    return read_declarations(Settings)


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
