"""`ask` and `chat`: from settings to models, from an answer to the terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.config import Settings, default_config_path, load_settings, read_key, user_catalog_dir
from mlxroute.errors import LargeError, UsageError
from mlxroute.types import Message

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.engine import Answer
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

DEFAULT_SMALL = "qwen2.5-coder-0.5b"
# As calibrated for the default small model.
DEFAULT_THRESHOLD_NATS = 1.64
_OFFLINE = "--offline: the small model answers alone"
_NO_LARGE = (
    "no large model: the small one answers alone. Give a server with --large URL (or"
    " OPENAI_BASE_URL), or start one here with `mlxroute host`."
)


def settings_from(arguments: Mapping[str, Any]) -> Settings:
    """Settings from a command's arguments, the environment and the config file."""
    known = {item.name for item in fields(Settings)}
    flags = {key: _as_text(value) for key, value in arguments.items() if key in known}
    return load_settings(flags, environ=os.environ, path=default_config_path())


def _as_text(value: Any) -> Any:
    """A flag's value with bytes that are no UTF-8 replaced; a list as a tuple."""
    if isinstance(value, list):
        return tuple(_as_text(item) for item in value)
    if isinstance(value, str):
        return value.encode(errors="surrogateescape").decode(errors="replace")
    return value


class Session:
    """The models, router and options behind a run of questions."""

    def __init__(
        self,
        small: SmallModel,
        large: LargeModel | None,
        settings: Settings,
        *,
        threshold: float,
    ) -> None:
        from mlxroute.conversation import Conversation

        self.small = small
        self.large = large
        self.settings = settings
        self._threshold = threshold
        self.modes = ("wait",)
        self.mode = settings.mode
        self.conversation = Conversation(system=settings.system)

    @property
    def threshold(self) -> float:
        """Entropy in nats above which the large model is asked; inf when there is none."""
        return math.inf if self.large is None else self._threshold

    @threshold.setter
    def threshold(self, nats: float) -> None:
        if self.large is None:
            raise UsageError("there is no large model to ask; start with --large URL")
        self._threshold = nats

    def answer(self, messages: Sequence[Message]) -> Answer:
        """Start answering a conversation."""
        from mlxroute.engine import generate
        from mlxroute.routers import EntropyRouter

        settings = self.settings
        return generate(
            self.small,
            self.large,
            messages,
            router=EntropyRouter(self.threshold),
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            timeout_s=settings.timeout,
            strict=settings.strict,
        )

    def describe(self) -> str:
        """One line: which models, which threshold."""
        if self.large is None:
            return f"{self.small.name} alone"
        return (
            f"{self.small.name}, asking {self.large.model_name} at {self.large.base_url}"
            f" above {self.threshold:g} nats"
        )

    def close(self) -> None:
        if self.large is not None:
            self.large.close()


def open_session(settings: Settings, err: Console) -> Session:
    """Check the settings, reach the large side, load the small model."""
    from mlxroute.cli.progress import Reporter

    _check(settings)
    large = _open_large(settings, err)
    with Reporter(err) as reporter:
        small = load_small(settings, reporter)
        if large is None:
            reporter.notify(_OFFLINE if settings.offline else _NO_LARGE)
    return Session(small, large, settings, threshold=_threshold(settings, small, large))


def load_small(settings: Settings, reporter: Any) -> SmallModel:
    """The small model of the settings, with progress on the terminal."""
    from mlxroute.small import SmallModel

    return SmallModel.load(
        settings.small or DEFAULT_SMALL,
        adapter=Path(settings.adapter).expanduser() if settings.adapter else None,
        cache_dir=Path(settings.cache_dir).expanduser() if settings.cache_dir else None,
        offline=settings.offline,
        kernel=settings.kernel,
        progress=reporter.progress,
        notify=reporter.notify,
    )


def ask(prompt: Sequence[str], settings: Settings, *, json_lines: bool) -> int:
    """Answer one question; return the exit code."""
    from mlxroute.cli.output import consoles, write_json, write_plain

    out, err = consoles()
    question = _question(prompt)
    session = open_session(settings, err)
    try:
        answer = session.answer([*session.conversation.messages, _user(question)])
        if json_lines:
            return write_json(answer, session, stream=sys.stdout)
        if out.is_terminal:
            return show_live(answer, session, out, err)
        return write_plain(answer, stream=sys.stdout, err=err)
    except BrokenPipeError:
        return _reader_left()
    finally:
        session.close()


def _reader_left() -> int:
    # Keeps the interpreter's own flush at exit from failing too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def chat(settings: Settings) -> int:
    """Hold a conversation; return the exit code."""
    from mlxroute.cli.chat import run_chat
    from mlxroute.cli.output import consoles, history_path

    out, err = consoles()
    session = open_session(settings, err)
    try:
        return run_chat(
            session,
            console_out=out,
            console_err=err,
            history_path=history_path(),
            heat=settings.heat,
        )
    except BrokenPipeError:
        return _reader_left()
    finally:
        session.close()


def show_live(answer: Answer, session: Session, out: Console, err: Console) -> int:
    """Show the answer as it grows; return 130 after Ctrl-C, else 0."""
    from mlxroute.view import LiveView, summary_line

    view = LiveView(out, heat=session.settings.heat, threshold=session.threshold)
    stopped = False
    try:
        stats = view.show(answer)
    except KeyboardInterrupt:
        stopped, stats = True, answer.stats()
    err.print(summary_line(stats), style="dim", markup=False, soft_wrap=True)
    return 130 if stopped else 0


def _question(prompt: Sequence[str]) -> str:
    """The prompt's words; `-` among them, or nothing at all, stands for standard input."""
    if "-" in prompt or (not prompt and not sys.stdin.isatty()):
        piped = sys.stdin.read()
        text = "\n\n".join(piped if part == "-" else part for part in prompt or ["-"])
    else:
        text = " ".join(prompt)
    text = _as_text(text)
    if not text.strip():
        raise UsageError('the prompt is empty; try `mlxroute ask "Why is the sky blue?"`')
    return str(text)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _check(settings: Settings) -> None:
    """Refuse bad values before anything is fetched or loaded."""
    from mlxroute.engine import Options
    from mlxroute.routers import EntropyRouter
    from mlxroute.types import Sampling

    if settings.router != "entropy":
        raise UsageError(f"no router named {settings.router!r}; there is: entropy")
    if settings.mode != "wait":
        raise UsageError(f"no mode named {settings.mode!r}; there is: wait")
    EntropyRouter(0.0 if settings.threshold is None else settings.threshold)
    Options(
        max_tokens=settings.max_tokens,
        sampling=Sampling(settings.temperature, settings.top_p, settings.seed),
        timeout_s=settings.timeout,
    )


def _open_large(settings: Settings, err: Console) -> LargeModel | None:
    if settings.offline or settings.large is None:
        return None
    from mlxroute.large import LargeModel

    key = read_key(settings, os.environ)
    large = LargeModel(
        settings.large,
        model=settings.large_model,
        api_key=key.reveal() if key else None,
        timeout_s=settings.timeout,
    )
    try:
        large.connect()
    except LargeError as exc:
        from mlxroute.view import printable

        if settings.strict:
            raise
        err.print(
            f"warning: {printable(str(exc))}; until it answers the small model writes alone",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    return large


def _threshold(settings: Settings, small: SmallModel, large: LargeModel | None) -> float:
    """The flag, else the catalogue's figure for the pair, else the general default."""
    from mlxroute.catalog import Catalog

    if settings.threshold is not None:
        return settings.threshold
    if large is None:
        return DEFAULT_THRESHOLD_NATS
    catalog = Catalog.load(user_catalog_dir())
    pair = catalog.pair(small.name, large.model_name) or catalog.pair(small.name)
    return pair.threshold if pair else DEFAULT_THRESHOLD_NATS
