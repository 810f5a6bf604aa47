"""Fail if the reports of a Mac show that the Metal kernel did not run, or chose other tokens.

    python .ci/check_mac_reports.py kernels.json speed.json

The two files have the output of `mlxroute bench kernels` and of `mlxroute bench speed`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def faults(kernels: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """Return what is wrong in the two reports, one line for each fault."""
    lines = []
    if kernels["metal"] != "in use":
        lines.append(f"no Metal kernel: {kernels['metal']}")
    for entry in kernels["kernels"]:
        lines += [
            f"the {name} kernel has other top ids at a vocabulary of {entry['vocabulary']}"
            for name, error in entry["error"].items()
            if not error["same_top_ids"]
        ]
    if not speed["same_tokens"]:
        lines.append(f"{speed['small']}: mlxroute and mlx_lm wrote different tokens")
    return lines


if __name__ == "__main__":
    reports = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:3]]
    sys.exit("\n".join(faults(*reports)) or None)
