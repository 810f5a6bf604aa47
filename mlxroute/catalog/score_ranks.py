"""Quantiles of a small model's router scores, from which a budget gets its first thresholds.

They are `ranks/<key>.json` in the user's catalogue folder, where `mlxroute calibrate` writes them,
or in the shipped one; see `model_keys`. The user's file takes precedence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from mlxroute.catalog import shipped_dir
from mlxroute.catalog.model_keys import model_key
from mlxroute.errors import CatalogError
from mlxroute.replace_file import replace_file
from mlxroute.statistics import MIN_QUANTILES, interpolated_quantile
from mlxroute.untrusted_text import TextFile, parse_json

RANK_STEPS: Final = 64
"""Scores are kept at the ranks 0, 1/64, ... 1."""
# A budget soon adapts to the scores it sees, so it may start from those of another model.
_FALLBACK_MODEL: Final = "qwen2.5-coder-0.5b"
_MAX_FILE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class ScoreRanks:
    """The distribution of each router's scores over positions of a small model's answers.

    Args:
        small: Name of the small model, or the path of its folder.
        data: Description of the questions that were answered.
        positions: Number of positions that were scored.
        quantiles: By router, its scores at evenly spaced ranks in rising order, from the lowest
            (rank 0) to the highest (rank 1).
    """

    small: str
    data: str
    positions: int
    quantiles: Mapping[str, tuple[float, ...]]

    @classmethod
    def find(cls, small: str, folder: Path) -> Self:
        """Return the ranks of a small model: the user's, else the shipped, else another model's.

        Raises CatalogError if the file is not valid, and as `model_key`.
        """
        key = model_key(small, folder)
        for parent in (folder, shipped_dir()):
            if (path := _ranks_file(parent, key)).is_file():
                return cls._read(path)
        return cls._read(_ranks_file(shipped_dir(), _FALLBACK_MODEL))

    def __getitem__(self, router: str) -> tuple[float, ...]:
        """Return the quantiles of a router's scores, (0.0, 1.0) if it was not calibrated."""
        return self.quantiles.get(router, (0.0, 1.0))

    def with_quantiles(self, router: str, quantiles: tuple[float, ...]) -> Self:
        """Return a copy with these quantiles for a router; with fewer than two, no change."""
        if len(quantiles) < MIN_QUANTILES:
            return self
        return replace(self, quantiles={**self.quantiles, router: quantiles})

    def threshold_at_rate(self, router: str, rate: float) -> float:
        """Return the score that a share `rate` (0 to 1) of the positions exceeds."""
        return interpolated_quantile(self[router], 1.0 - rate)

    def write(self, folder: Path) -> Path:
        """Write the ranks to the user's catalogue folder and return the file.

        Raises OSError if it cannot be written, an old one then stays; and as `model_key`.
        """
        path = _ranks_file(folder, model_key(self.small, folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "small": self.small,
            "data": self.data,
            "positions": self.positions,
            "quantiles": dict(self.quantiles),
        }
        replace_file(path, f"{json.dumps(document)}\n".encode())
        return path

    @classmethod
    def _read(cls, path: Path) -> Self:
        file = TextFile(path, "the score ranks", max_bytes=_MAX_FILE_BYTES, error=CatalogError)
        try:
            table: Any = parse_json(file.read())
            quantiles = {
                str(router): tuple(float(score) for score in scores)
                for router, scores in table["quantiles"].items()
            }
            ranks = cls(str(table["small"]), str(table["data"]), int(table["positions"]), quantiles)
        except (ValueError, OverflowError, TypeError, KeyError, AttributeError) as exc:
            raise CatalogError(
                f"{path} is not a file of score ranks; delete it and run `mlxroute calibrate`"
            ) from exc
        for router, scores in quantiles.items():
            if len(scores) < MIN_QUANTILES or list(scores) != sorted(scores):
                raise CatalogError(
                    f"{path}: the scores of {router!r} must be at least {MIN_QUANTILES}, in rising"
                    " order; delete the file and run `mlxroute calibrate`"
                )
        return ranks


def _ranks_file(folder: Path, key: str) -> Path:
    return folder / "ranks" / f"{key}.json"
