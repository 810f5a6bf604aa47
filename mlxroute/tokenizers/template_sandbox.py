"""Chat templates run as untrusted code: without access to Python, in bounded time and memory."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxroute.errors import MlxRouteError
from mlxroute.safe_text import printable_line

# Compiling this much takes two seconds at most.
_MAX_SOURCE: Final = 1 << 17
# Characters of one value, and of all that a template reads and writes.
_MAX_CHARACTERS: Final = 1 << 25
_MAX_TOTAL: Final = 1 << 27
_MAX_STEPS: Final = 1 << 20
_MAX_SECONDS: Final = 5.0
# Maximum number, and maximum number of digits in a format such as `%100d`.
_MAX_NUMBER: Final = 1 << 20
_MAX_BITS: Final = 4096
_WIDE_FORMAT: Final = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\d{0,6}\.)?(?:\*|\d{6})|\{[^{}]*\d{6}")
_MAX_TIME_FORMAT: Final = 1000
_MAX_INDENT: Final = 64
_MAX_ITEMS: Final = 1 << 20
# What these return can be as long as the product of their arguments.
_MULTIPLYING: Final = {"replace", "join", "translate", "indent", "wordwrap", "batch", "expandtabs"}
# These take far more time or memory than their arguments, and cannot be stopped meanwhile.
_SLOW: Final = {"pprint", "striptags", "sum", "urlencode", "urlize", "wordwrap", "xmlattr"}
_SLOW_BY_ITEM: Final = {"batch", "dictsort", "groupby", "slice", "sort", "unique"}
_MAX_SLOW: Final = 1 << 14
# These turn a text into a list of its parts.
_SPLITTING: Final = {"list", "rsplit", "split", "splitlines", "title", "wordcount"}
_MAX_SPLIT: Final = 1 << 22
# What a template reads as the present time; None for the real one.
_TIME: Final[ContextVar[datetime | None]] = ContextVar("template_time", default=None)


class TemplateFailure(MlxRouteError):
    """Raised when a template cannot be rendered; the message says why, without the model's name."""


class TemplateTooCostly(TemplateFailure):
    """Raised when a template takes too long or writes too much."""


@contextmanager
def at_time(moment: datetime) -> Iterator[None]:
    """Let templates that are rendered in the block read `moment`, a local time, as the present."""
    token = _TIME.set(moment)
    try:
        yield
    finally:
        _TIME.reset(token)


class TemplateProgram:
    """A compiled chat template.

    Args:
        source: Its text.

    Raises:
        TemplateFailure: It cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        if len(source) > _MAX_SOURCE:
            raise TemplateTooCostly(f"it has more than {_MAX_SOURCE:,} characters")
        self._environment = _BoundedEnvironment()
        self._template = guard(lambda: self._environment.from_string(source))

    def start(self) -> None:
        """Begin a rendering: the bounds hold for all of its runs together."""
        self._environment.start()

    def run(self, values: Mapping[str, object]) -> str:
        """Return its output for these variables. Raises TemplateFailure."""
        text: str = guard(lambda: self._template.render(values))
        self._environment.spend(len(text))
        return text


def guard(run: Callable[[], Any]) -> Any:
    """Return what a step of foreign code returns; any error becomes a TemplateFailure."""
    try:
        return run()
    except TemplateFailure:
        raise
    except MemoryError as exc:
        raise TemplateTooCostly("it takes too much memory") from exc
    except RecursionError as exc:
        raise TemplateFailure("it is nested too deeply") from exc
    except Exception as exc:
        reason = printable_line(str(exc), limit=200)
        named = reason if isinstance(exc, TemplateError) else f"{type(exc).__name__}: {reason}"
        raise TemplateFailure(named or type(exc).__name__) from exc


class _Generation(Extension):
    """The block tag that marks an assistant's text for training; here it has no effect."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # The base class has a set.

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedCode(CodeGenerator):
    """Compiles templates so that each iteration and each concatenation is counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, _count_step(node))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _count_step(node: nodes.Node) -> nodes.Node:
    """Return a statement that counts an iteration, with the characters its constants write."""
    size = 1 + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    # A node for the call itself would be run through the sandbox.
    call = nodes.EnvironmentAttribute(f"count_step({size})")
    return nodes.ExprStmt(call).set_lineno(node.lineno)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives chat templates, with bounds on time and memory."""

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._count_output,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bound(name, f) for name, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _format_now
        self.start()

    def start(self) -> None:
        """Begin to count anew."""
        self._steps = 0
        self._characters = 0
        self._end_s = time.monotonic() + _MAX_SECONDS

    def count_step(self, size: int = 1) -> None:
        """Count an iteration or a call, and the characters that it writes."""
        self._steps += 1
        self.spend(size)
        if self._steps > _MAX_STEPS:
            raise TemplateTooCostly("it does not end")
        if time.monotonic() > self._end_s:
            raise TemplateTooCostly(f"it takes more than {_MAX_SECONDS:.0f} s")

    def spend(self, size: int) -> None:
        """Count characters."""
        self._characters += size
        if self._characters > _MAX_TOTAL:
            raise TemplateTooCostly(f"it writes more than {_MAX_TOTAL:,} characters")

    def concatenate(self, parts: Iterable[Any]) -> str:
        """Return the texts of the parts as one; the operator `~`."""
        texts = [str(part) for part in parts]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.count_step()
        sizes = _size(left), _size(right)
        match operator:
            case "*" if isinstance(left, str | list | tuple) or isinstance(
                right, str | list | tuple
            ):
                count = right if isinstance(right, int) else left
                self.spend(max(0, count) * max(sizes) if isinstance(count, int) else 0)
            case "*":
                _check_bits(sum(sizes))
            case "**":
                _check_bits(sizes[0] * abs(right) if isinstance(right, int) else 0)
            case "%" if isinstance(left, str):
                _check_format(left)
                self.spend(sum(sizes))
            case _:
                self.spend(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        # The sandbox wraps `str.format`.
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        self.count_step()
        self._check_arguments(getattr(method, "__name__", ""), (owner, *args, *kwargs.values()))
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str):
            self.spend(len(result))
        return result

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with bounds on its arguments and its result."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.count_step()
            self._check_arguments(name, (*args, *kwargs.values()))
            result = function(*args, **kwargs)
            if isinstance(result, str):
                self.spend(len(result))
            return result

        return bounded

    def _check_arguments(self, name: str, values: tuple[Any, ...]) -> None:
        """Refuse arguments that could make the result too large."""
        values = tuple(v for v in values if isinstance(v, str | bytes | int | list | tuple | dict))
        for value in values:
            if _is_number(value) and abs(value) > _MAX_NUMBER:
                raise TemplateTooCostly("it uses a number that is too large")
        if name in ("format", "format_map") and isinstance(values[0], str):
            _check_format(values[0])
        sizes = [_size(value) for value in values if not _is_number(value)]
        if name in _MULTIPLYING:
            product = 1
            for size in [*sizes, *(abs(v) for v in values if _is_number(v))]:
                product *= max(1, size)
            if product > 8 * _MAX_CHARACTERS:
                raise TemplateTooCostly(f"it writes more than {_MAX_CHARACTERS:,} characters")
        limit = _MAX_SPLIT if name in _SPLITTING else _MAX_CHARACTERS
        if name in _SLOW_BY_ITEM:
            sizes = [len(value) for value in values if not _is_number(value)]
        if name in _SLOW or name in _SLOW_BY_ITEM:
            limit = _MAX_SLOW
            sizes += [abs(value) for value in values if _is_number(value)]
        if sum(sizes) > limit:
            raise TemplateTooCostly(f"its {name or 'call'} reads more than {limit:,} characters")

    def _count_output(self, value: Any) -> Any:
        """Count what an expression writes; Jinja calls this for each of them."""
        if isinstance(value, str):
            self.count_step(len(value))
        elif not isinstance(value, int | float):
            self.count_step(_size(value))
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateTooCostly("it uses a number that is too large")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateTooCostly("it uses a format that is too wide")


def _size(value: object) -> int:
    """Return the characters or items that a value holds, those of its items included."""
    total, count, pending = 0, 0, [value]
    while pending:
        item = pending.pop()
        count += 1
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length()
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            pending += item
        if count + len(pending) > _MAX_ITEMS or total > _MAX_CHARACTERS:
            raise TemplateTooCostly("it builds a value that is too large")
    return total + count


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _format_now(form: str) -> str:
    if len(form) > _MAX_TIME_FORMAT:
        raise TemplateTooCostly("it uses a format that is too wide")
    _check_format(form)
    return (_TIME.get() or datetime.now()).strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    indent = options.get("indent") or 0
    if (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise TemplateTooCostly("it indents too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
