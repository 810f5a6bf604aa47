"""The child process of `code_sandbox`: isolates itself, then runs a program from its input.

It is run as a file, without this package on its path. Its input is a line with a secret, then the
program. Its output is a line that says that it is isolated, and the secret if the program ran to
its end; or `isolation: ` and the reason why it cannot be isolated, and then nothing is run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import types

_CLONE_NEW_USER, _CLONE_NEW_PIDS = 0x10000000, 0x20000000
_CLONE_NEW_NET, _CLONE_NEW_MOUNTS = 0x40000000, 0x00020000
_CLONE_NEW_IPC = 0x08000000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION = 0x20080522
_CPU_S = 5
_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Isolate the process, run the program, and write the secret."""
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    output = os.dup(1)
    try:
        _isolate()
    except OSError as exc:
        os.write(output, f"isolation: {exc.strerror or exc}".encode())
        return
    os.write(output, b"isolated\n")
    # Without this module's own `__future__` imports.
    code = compile(program, "program", "exec", dont_inherit=True)
    # Data classes and type hints look up the module of a class.
    module = sys.modules["program"] = types.ModuleType("program")
    exec(code, module.__dict__)
    os.write(output, secret)


def _isolate() -> None:
    """Take away from the process what a program must not have. Raises OSError if that fails."""
    if sys.platform == "linux":
        _enter_namespaces()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _limit(resource.RLIMIT_CPU, _CPU_S)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, 0)


def _enter_namespaces() -> None:
    """Leave network, processes and shared memory; make every file read-only for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespaces = _CLONE_NEW_USER | _CLONE_NEW_NET | _CLONE_NEW_MOUNTS
    namespaces |= _CLONE_NEW_PIDS | _CLONE_NEW_IPC
    _check(libc.unshare(namespaces), "no namespaces of its own")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    arguments = (_AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _check(libc.syscall(_MOUNT_SETATTR, *arguments), "files cannot be made read-only")
    # Capabilities in the namespace would allow the program to make files writable again.
    header, no_capabilities = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _check(libc.capset(header, no_capabilities), "capabilities cannot be given up")
    # Two, because the namespace's first process ignores signals; all others end with it.
    for _ in range(2):
        if child := os.fork():
            os.waitpid(child, 0)
            os._exit(0)


def _check(result: int, problem: str) -> None:
    if result:
        raise OSError(f"{problem} ({os.strerror(ctypes.get_errno())})")


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    # macOS does not limit address space; the time limit remains.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
