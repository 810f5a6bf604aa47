"""The mark of tests that need llama.cpp, which is not installed everywhere."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp is installed on Linux only"
)
