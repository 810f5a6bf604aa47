"""Run the Metal source that MLX generates on a CPU, in place of `mx.fast.metal_kernel`'s kernels.

Called inside export tracing, a kernel does not run, but MLX prints the whole source it would give
to Metal. That source is compiled as C++ with `shim.h` and run on the same arrays, so the Python
side of the kernel is tested too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxroute.small.kernels import metal_kernel
from tests.conftest import CACHE_DIR

# Run as a C compiler, because it would build a C++ library first.
CLANG = (sys.executable, "-m", "ziglang", "cc", "-x", "c++")
GXX = ("g++",)
FORWARD, BACKWARD, RANDOM = 0, 1, 7

_SHIM = Path(__file__).with_name("shim.h")
_FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"),
    *("-fno-exceptions", "-fno-rtti"),
)
_ATTRIBUTES = {
    "thread_position_in_threadgroup": "uint3{shim::machine.current, 0, 0}",
    "threadgroup_position_in_grid": "uint3{shim::machine.group_x, shim::machine.group_y, 0}",
    "threadgroups_per_grid": "uint3{shim::machine.groups_x, 1, 1}",
    "thread_index_in_simdgroup": "shim::machine.current % 32",
    "simdgroup_index_in_threadgroup": "shim::machine.current / 32",
}


class EmulationError(Exception):
    """Raised when a kernel breaks a rule that a GPU does not enforce."""


def default_compiler() -> Sequence[str]:
    """Return g++ if it is installed, else the clang of the `ziglang` wheel."""
    return GXX if shutil.which("g++") else CLANG


class Emulator:
    """Replaces `metal_kernel.build_kernel`: its kernel objects run on this CPU.

    `schedule` is the order in which ready threads run (FORWARD, BACKWARD, or a random seed),
    `mutate` changes a kernel's source before it is compiled, `texts` holds every source that ran.
    """

    def __init__(
        self,
        *,
        compiler: Sequence[str] | None = None,
        flags: Sequence[str] = (),
        schedule: int = FORWARD,
        mutate: Callable[[str], str] = str,
    ) -> None:
        self._compiler = (*(compiler or default_compiler()), *flags)
        self._schedule = schedule
        self._mutate = mutate
        self.texts: list[str] = []

    def kernel(self, name: str) -> Callable[..., list[mx.array]]:
        """Return a kernel object for the source called `name`."""
        return functools.partial(self._run, _real_kernel(name))

    def _run(self, kernel: Any, *, inputs: list[mx.array], **call: Any) -> list[mx.array]:
        text = self._mutate(_generated(kernel, inputs, call))
        self.texts.append(text)
        buffers = [np.array(value.view(mx.uint8)) for value in inputs]
        shapes = [np.array(value.shape, dtype=np.int32) for value in inputs]
        outputs = [np.full(shape, np.nan, dtype=np.float32) for shape in call["output_shapes"]]
        _execute(
            _compiled(text, self._compiler),
            [
                *buffers,
                *(s for s, i in zip(shapes, inputs, strict=True) if _uses_shape(text)),
                *outputs,
            ],
            call["grid"],
            call["threadgroup"],
            self._schedule,
        )
        return [mx.array(value) for value in outputs]


# The original, because tests patch the module.
_real_kernel = metal_kernel.build_kernel


def _uses_shape(text: str) -> bool:
    return bool(re.search(r"\w+_shape \[\[buffer", text))


def _generated(kernel: Any, inputs: list[mx.array], call: dict[str, Any]) -> str:
    key = (kernel, tuple((i.shape, i.dtype) for i in inputs), tuple(call["template"]))
    if key not in _TEXTS:
        _TEXTS[key] = _trace(kernel, inputs, call)
    return _TEXTS[key]


_TEXTS: dict[Any, str] = {}


def _trace(kernel: Any, inputs: list[mx.array], call: dict[str, Any]) -> str:
    """Return what MLX prints while it traces a call of `kernel`."""

    def traced(*arrays: mx.array) -> Any:
        return kernel(inputs=list(arrays), verbose=True, **call)

    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        stdout = os.dup(1)
        log = Path(folder, "log")
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            try:
                mx.export_function(str(Path(folder, "traced.mlxfn")), traced, *inputs)
            finally:
                # MLX flushes its C++ streams at every line end.
                os.dup2(stdout, 1)
                os.close(stdout)
        printed = log.read_text(encoding="ascii")
    source = re.search(r"```\n(.*)```", printed, re.DOTALL)
    assert source, printed
    return source[1]


def as_cpp(text: str) -> str:
    """Return the generated source as C++, with a function that runs it."""
    instantiation = re.search(r"\ntemplate \[\[host_name.*decltype\((\w+<.*>)\) .*;\n", text)
    assert instantiation, text
    body = text.replace(instantiation[0], "\n")
    signature = re.search(r"\[\[kernel\]\] void \w+\((.*?)\) \{", body, re.DOTALL)
    assert signature, text
    arguments = []
    for index, parameter in enumerate(signature[1].split(",\n")):
        declared, attribute = re.match(r"\s*(.*\S)\s*\[\[(.*)\]\]", parameter).groups()  # type: ignore[union-attr]
        if attribute.startswith("buffer"):
            kind = declared.rsplit(" ", 1)[0]
            arguments.append(f"({kind})shim_buffers[{index}]")
        else:
            arguments.append(_ATTRIBUTES[attribute])
    return (
        f'#include "shim.h"\n{_threadgroup_arrays(body)}\n'
        "static void **shim_buffers;\n"
        f"static void shim_body() {{ {instantiation[1]}({', '.join(arguments)}); }}\n"
        'extern "C" const char *shim_run(\n'
        "    void **buffers, const uint *grid, const uint *threads, uint schedule) {\n"
        "  shim_buffers = buffers;\n"
        "  return shim::run(shim_body, grid, threads, schedule);\n"
        "}\n"
    )


def _threadgroup_arrays(text: str) -> str:
    """Replace threadgroup arrays by references into the shim's memory, one after the other."""
    offsets = ["0"]

    def reference(match: re.Match[str]) -> str:
        kind, name, count = match.groups()
        begin = offsets[-1]
        bytes_ = f"sizeof({kind}) * ({count})"
        offsets.append(f"{begin} + {bytes_}")
        typed = f"SHIM_THREADGROUP {kind}"
        memory = f"shim::threadgroup_memory<{begin}, {bytes_}>()"
        return f"{typed} (&{name})[{count}] = *({typed} (*)[{count}]){memory};"

    return re.sub(r"threadgroup (\w+) (\w+)\[([^\]]+)\];", reference, text)


@functools.cache
def _folder() -> Path:
    """Return where libraries stay between runs: compiling one takes most of a second."""
    folder = CACHE_DIR / "test-files" / "metal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _compiled(text: str, command: Sequence[str]) -> Any:
    source = as_cpp(text)
    parts = (source, _SHIM.read_text(encoding="ascii"), command, _FLAGS, platform.machine())
    library = _folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        _compile(source, command, library)
    run = ctypes.CDLL(str(library)).shim_run
    run.restype = ctypes.c_char_p
    return run


def _compile(source: str, command: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file, built = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        file.write_text(source, encoding="ascii")
        result = subprocess.run(
            [*command, *_FLAGS, f"-I{_SHIM.parent}", str(file), "-o", str(built)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if result.returncode:
            raise EmulationError(f"does not compile:\n{result.stderr}")
        # Another worker may compile the same kernel.
        built.replace(library)


def _execute(
    run: Any,
    buffers: list[Any],
    grid: tuple[int, int, int],
    threads: tuple[int, int, int],
    schedule: int,
) -> None:
    buffers = [
        np.ascontiguousarray(buffer) if not buffer.flags.owndata else buffer for buffer in buffers
    ]
    pointers = (ctypes.c_void_p * len(buffers))(*[buffer.ctypes.data for buffer in buffers])
    sizes = [(ctypes.c_uint * 3)(*values) for values in (grid, threads)]
    error = run(pointers, *sizes, ctypes.c_uint(schedule))
    if error:
        raise EmulationError(error.decode())
