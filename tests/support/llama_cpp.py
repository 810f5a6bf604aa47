"""The mark of tests that need llama.cpp, which is not installed everywhere."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def has_llama_cpp() -> bool:
    """Return whether llama.cpp is installed."""
    return find_spec("xllamacpp") is not None


needs_llama_cpp = pytest.mark.skipif(
    not has_llama_cpp(), reason="xllamacpp is installed on Linux only"
)
