"""`mlx_lm` without its `__init__`, which imports transformers and takes a second.

The parts that decode, `mlx_lm.models` and `mlx_lm.sample_utils`, need none of it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from types import ModuleType
from typing import Any

_NAME = "mlx_lm"
_lock = threading.RLock()


class _DeferredPackage(ModuleType):
    """A package whose `__init__` runs when a name that it defines is first used."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if isinstance(self, _DeferredPackage):
                self.__class__ = ModuleType  # type: ignore[assignment]
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_mlx_lm_init() -> None:
    """Make imports of `mlx_lm`'s submodules skip its `__init__`, until that is needed.

    Does nothing if `mlx_lm` is imported already, or cannot be found.
    """
    with _lock:
        spec = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
        if spec is None:
            return
        package = _DeferredPackage(_NAME)
        package.__spec__ = spec
        package.__loader__ = spec.loader
        package.__package__ = _NAME
        package.__file__ = spec.origin
        package.__path__ = list(spec.submodule_search_locations or ())
        # `mlx_lm` sets it before transformers is imported, which would print a warning.
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
        sys.modules[_NAME] = package
