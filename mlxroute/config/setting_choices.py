"""Values of settings that have a fixed set of them."""

from __future__ import annotations

from enum import StrEnum


class RouterName(StrEnum):
    """Names of the scores that `--router` takes."""

    ENTROPY = "entropy"
    MARGIN = "margin"
    MAX_PROBABILITY = "max-probability"
    LOGU = "logu"
    HEAD = "head"
    RANDOM = "random"


class BenchRouterName(StrEnum):
    """Names of the routers of `bench quality`: those of `--router`, and three baselines."""

    ENTROPY = "entropy"
    MARGIN = "margin"
    MAX_PROBABILITY = "max-probability"
    LOGU = "logu"
    HEAD = "head"
    RANDOM = "random"
    POSITION = "position"
    FIRST = "first"
    SENTENCE = "sentence"


class KernelName(StrEnum):
    """Implementations of the logit kernel; `auto` is Metal where it works, else the graph."""

    AUTO = "auto"
    METAL = "metal"
    GRAPH = "graph"


class EngineName(StrEnum):
    """Programs that serve a large model here; `auto` is llama.cpp where MLX has no GPU."""

    AUTO = "auto"
    MLX = "mlx"
    LLAMA_CPP = "llama.cpp"


class ToolPolicyName(StrEnum):
    """What an endpoint does with requests that have tools or a schema."""

    REFUSE = "refuse"
    LARGE = "large"
