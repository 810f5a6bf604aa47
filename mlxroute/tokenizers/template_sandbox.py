"""Chat templates run as untrusted code: without access to Python, in bounded time and memory."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlxroute.safe_text import printable_line
from mlxroute.tokenizers.template_bounds import (
    HOLDERS,
    MAX_CHARACTERS,
    TemplateFailure,
    TemplateTooCostly,
    check_bits,
    check_fields,
    check_format,
    value_size,
)

# Compiling this much takes two seconds at most.
_MAX_SOURCE: Final = 1 << 17
# Characters of all that a template reads and writes.
_MAX_TOTAL: Final = 1 << 27
_MAX_STEPS: Final = 1 << 20
_MAX_SECONDS: Final = 5.0
_MAX_NUMBER: Final = 1 << 20
_FORMATTING: Final = {"format", "format_map"}
_MAX_TIME_FORMAT: Final = 1000
_MAX_INDENT: Final = 64
# A reference takes as much memory as this many characters.
_ITEM_CHARACTERS: Final = 8
# These make bytes, which no bound counts, and dictionaries with any numbers as keys.
_UNSAFE_METHODS: Final = {"encode", "fromkeys", "to_bytes"}
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


class _Namespace(Namespace):
    """A namespace whose text does not hold its values: they may hold others many times over."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """The block tag that marks an assistant's text for training; here it has no effect."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # The base class has a set.

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedCode(CodeGenerator):
    """Compiles templates so that iterations, concatenations, and new values are counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, _count_step(node))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        with self._checked():
            super().visit_List(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        with self._checked():
            super().visit_Dict(node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        # The others are targets of assignments.
        with self._checked() if node.ctx == "load" else nullcontext():
            super().visit_Tuple(node, frame)

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        self.write(f" {operators[node.op]} environment.in_time(")
        self.visit(node.expr, frame)
        self.write(")")

    @contextmanager
    def _checked(self) -> Iterator[None]:
        self.write("environment.check_value(")
        yield
        self.write(")")


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
        self.tests = {name: self._timed(test) for name, test in self.tests.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = _Namespace
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
        self.in_time()

    def in_time(self, value: Any = None) -> Any:
        """Return a value, such as the operand of a comparison, if there is time left."""
        if time.monotonic() > self._end_s:
            raise TemplateTooCostly(f"it takes more than {_MAX_SECONDS:.0f} s")
        return value

    def spend(self, size: int) -> None:
        """Count characters."""
        self._characters += size
        if self._characters > _MAX_TOTAL:
            raise TemplateTooCostly(f"it writes more than {_MAX_TOTAL:,} characters")

    def check_value(self, value: Any) -> Any:
        """Return a value that the template makes, and count it.

        What Python does with one value cannot be stopped, so none may be too large or too deep.
        """
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, HOLDERS):
            self.in_time()
            value_size(value)
            self.spend(_ITEM_CHARACTERS * len(value))
        return value

    def concatenate(self, parts: tuple[Any, ...]) -> str:
        """Return the texts of the parts as one; the operator `~`."""
        self.in_time()
        for part in parts:
            value_size(part)
        texts = [str(part) for part in parts]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.count_step()
        sizes = value_size(left), value_size(right)
        match operator:
            case "*" if isinstance(left, str | list | tuple) or isinstance(
                right, str | list | tuple
            ):
                count = right if isinstance(right, int) else left
                self.spend(max(0, count) * max(sizes) if isinstance(count, int) else 0)
            case "*":
                check_bits(sum(sizes))
            case "**":
                check_bits(sizes[0] * abs(right) if isinstance(right, int) else 0)
            case "%" if isinstance(left, str):
                check_format(left)
                self.spend(sum(sizes))
            case _:
                self.spend(sum(sizes))
        result = super().call_binop(context, operator, left, right)
        value_size(result)
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        # The `attribute` of a filter can have any number of parts.
        return super().getitem(self.in_time(obj), argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        # The sandbox wraps `str.format`.
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "")
        self.count_step()
        self._check_arguments(name, (owner, *args, *kwargs.values()))
        if name in _FORMATTING and isinstance(owner, str):
            check_fields(owner)
        return self.check_value(super().call(context, obj, *args, **kwargs))

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with bounds on its arguments and its result."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.count_step()
            self._check_arguments(name, (*args, *kwargs.values()))
            return self.check_value(function(*args, **kwargs))

        return bounded

    def _timed(self, test: Any) -> Callable[..., Any]:
        """Return a test that looks at the clock, as a filter may run it for each of many items."""

        @functools.wraps(test)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.in_time()
            return test(*args, **kwargs)

        return timed

    def _check_arguments(self, name: str, values: tuple[Any, ...]) -> None:
        """Refuse arguments that could make the result too large."""
        if name in _FORMATTING:
            check_format(values[0])
        kinds: tuple[type[Any], ...] = (str, bytes, int, range, *HOLDERS)
        values = tuple(v for v in values if isinstance(v, kinds) and not isinstance(v, bool))
        for value in values:
            if _is_number(value) and abs(value) > _MAX_NUMBER:
                raise TemplateTooCostly("it uses a number that is too large")
        sizes = [value_size(value) for value in values if not _is_number(value)]
        if name in _MULTIPLYING:
            product = 1
            for size in [*sizes, *(abs(v) for v in values if _is_number(v))]:
                product *= max(1, size)
            if product > 8 * MAX_CHARACTERS:
                raise TemplateTooCostly(f"it writes more than {MAX_CHARACTERS:,} characters")
        limit = _MAX_SPLIT if name in _SPLITTING else MAX_CHARACTERS
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
            self.count_step(value_size(value))
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _format_now(form: str) -> str:
    if len(form) > _MAX_TIME_FORMAT:
        raise TemplateTooCostly("it uses a format that is too wide")
    check_format(form)
    return (_TIME.get() or datetime.now()).strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    indent = options.get("indent") or 0
    if (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise TemplateTooCostly("it indents too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
