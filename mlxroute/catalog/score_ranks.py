"""Which scores a small model's positions have, by rank: where a budget starts from.

One JSON file a model, `ranks/<name>.json`, in the user's catalogue folder or the shipped one;
`mlxroute calibrate` writes the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from mlxroute.catalog import shipped_dir
from mlxroute.errors import CatalogError
from mlxroute.statistics import interpolated_quantile

# A budget soon follows the model's own scores; until then those of another model serve.
_GENERAL: Final = "qwen2.5-coder-0.5b"
_FEWEST: Final = 2


@dataclass(frozen=True, slots=True)
class ScoreRanks:
    """Scores at evenly spaced ranks, lowest first, by router; from `positions` of `data`."""

    small: str
    data: str
    positions: int
    quantiles: Mapping[str, tuple[float, ...]]

    @classmethod
    def find(cls, small: str, folder: Path) -> Self:
        """What is known of a model, else what is of the default one.

        Raises CatalogError for a file that does not hold what it should.
        """
        for parent in (folder, shipped_dir()):
            if (path := _file(parent, small)).is_file():
                return cls._read(path)
        return cls._read(_file(shipped_dir(), _GENERAL))

    def __getitem__(self, router: str) -> tuple[float, ...]:
        """The quantiles of a router's scores; of one that was not calibrated, 0 and 1."""
        return self.quantiles.get(router, (0.0, 1.0))

    def with_quantiles(self, router: str, quantiles: tuple[float, ...]) -> Self:
        """The same, and a router's scores, if there are any."""
        if len(quantiles) < _FEWEST:
            return self
        return replace(self, quantiles={**self.quantiles, router: quantiles})

    def threshold_at_rate(self, router: str, rate: float) -> float:
        """The score that this share of the positions exceeds."""
        return interpolated_quantile(self[router], 1.0 - rate)

    def write(self, folder: Path) -> Path:
        """Write it where `of` finds it; return the file."""
        path = _file(folder, self.small)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return path

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            quantiles = {
                str(name): tuple(float(value) for value in values)
                for name, values in found["quantiles"].items()
            }
            ranks = cls(str(found["small"]), str(found["data"]), int(found["positions"]), quantiles)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise CatalogError(f"{path} holds no ranks; delete it and calibrate again") from exc
        for name, values in quantiles.items():
            if len(values) < _FEWEST or list(values) != sorted(values):
                raise CatalogError(f"{path}: the scores of {name!r} do not rise")
        return ranks


def _file(folder: Path, small: str) -> Path:
    return folder / "ranks" / f"{Path(small).name}.json"
