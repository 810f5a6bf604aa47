"""The child process of `code_sandbox`: isolates itself, then runs a program from its input.

It is run as a file, without this package on its path. Its input is a line with a secret, then the
program. Its output is the secret if the program ran to its end, or the reason why it cannot be
isolated.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys

_CLONE_NEW_USER, _CLONE_NEW_NET, _CLONE_NEW_MOUNTS = 0x10000000, 0x40000000, 0x00020000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_CPU_S = 5
_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Isolate the process, run the program, and write the secret."""
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    output = os.dup(1)
    if sys.platform == "linux" and (reason := _isolate()):
        os.write(output, f"isolation: {reason}".encode())
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _limit(resource.RLIMIT_CPU, _CPU_S)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    code = compile(program, "program", "exec")
    exec(code, {"__name__": "program"})
    os.write(output, secret)


def _isolate() -> str | None:
    """Leave the network and make every file read-only; return the reason if that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEW_USER | _CLONE_NEW_NET | _CLONE_NEW_MOUNTS):
        return f"no namespace of its own ({os.strerror(ctypes.get_errno())})"
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    arguments = (_AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    if libc.syscall(_MOUNT_SETATTR, *arguments):
        return f"files cannot be made read-only ({os.strerror(ctypes.get_errno())})"
    return None


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    # macOS does not limit address space; the time limit remains.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
