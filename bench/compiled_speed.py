"""Decoding without MLX's compilation over decoding with it, in turns in one process.

python bench/compiled_speed.py smollm2-135m --pairs 14 --tokens 24
"""

from __future__ import annotations

import argparse
import statistics
import time

from mlxroute.backend import blas
from mlxroute.user_folders import cache_folder

_PROMPT = "Tell me a long story about a fox and a crow."


def main() -> None:
    """Print the ratio of tokens per second, and whether both ways write the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small")
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    # MLX uses the fast BLAS only if it is loaded first.
    blas.interpose(cache_folder())
    import mlx.core as mx

    from mlxroute import SmallModel, generate
    from mlxroute.routers import never_escalate

    small = SmallModel.load(options.small)

    def decode() -> tuple[float, list[int]]:
        router = never_escalate()
        answer = generate(small, None, _PROMPT, router=router, max_tokens=options.tokens)
        tokens = iter(answer)
        next(tokens)
        began_s = time.perf_counter()
        ids = [token.token_id for token in tokens]
        return len(ids) / (time.perf_counter() - began_s), ids

    decode()
    ratios, are_equal = [], True
    for _ in range(options.pairs):
        mx.disable_compile()
        without, first = decode()
        mx.enable_compile()
        compiled, second = decode()
        ratios.append(without / compiled)
        are_equal = are_equal and first == second
    print(
        f"{options.small}: {statistics.median(ratios):.3f} of the compiled tokens/s,"
        f" {'the same tokens' if are_equal else 'OTHER TOKENS'}"
    )


if __name__ == "__main__":
    main()
