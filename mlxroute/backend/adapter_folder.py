"""Folders of LoRA weights: their fingerprint, and where they come from.

A folder has `adapters.safetensors` and `adapter_config.json`, as `mlx_lm.lora` writes them. That of
`mlxroute adapt` also has `provenance.json`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Final

from mlxroute.backend.model_files import read_json_object
from mlxroute.errors import UsageError, WeightsError

WEIGHTS_FILE: Final = "adapters.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
PROVENANCE_FILE: Final = "provenance.json"
_DIGITS: Final = 8
# Files that a killed process was writing; see `replace_file`.
_TEMPORARY: Final = re.compile(r"\.(adapters|adapter_config|provenance)\.\d+-[0-9a-f]+\.\w+")


def adapted_name(name: str, adapter: Path | None) -> str:
    """Return the name of a model with an adapter, such as `smollm2-135m+1a2b3c4d`.

    The digits are a fingerprint of the adapter, so that ranks, heads and records of one adapted
    model are not used for another. Without an adapter the name stays as it is.

    Args:
        name: Name of the model, or the path of its folder.
        adapter: Folder of LoRA weights, or None.

    Raises:
        UsageError: The folder cannot be read.
    """
    if adapter is None:
        return name
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            digest.update((adapter / file).read_bytes())
        except OSError as exc:
            raise UsageError(
                f"the adapter {adapter} has no readable {file}: {exc.strerror}",
                parameter="adapter",
            ) from exc
    return f"{name}+{digest.hexdigest()[:_DIGITS]}"


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Return what the configuration of a LoRA adapter says of its weights.

    Raises UsageError for an adapter of another kind, or whose configuration cannot be read.
    """
    try:
        config = read_json_object(adapter / CONFIG_FILE)
    except WeightsError as exc:
        raise UsageError(str(exc), parameter="adapter") from exc
    if config.get("fine_tune_type", "lora") != "lora":
        raise UsageError(
            f"the adapter {adapter} has no LoRA weights to train further", parameter="adapter"
        )
    return {
        "fine_tune_type": "lora",
        "num_layers": config.get("num_layers"),
        "lora_parameters": config.get("lora_parameters"),
    }


def read_trained_questions(adapter: Path) -> frozenset[str]:
    """Return the fingerprints of the questions that an adapter was trained or chosen with.

    Empty for an adapter that other programs made. Raises UsageError for a file that cannot be read
    as provenance.
    """
    file = adapter / PROVENANCE_FILE
    if not file.exists():
        return frozenset()
    try:
        questions: Any = read_json_object(file).get("questions")
    except WeightsError as exc:
        raise UsageError(str(exc), parameter="adapter") from exc
    if not isinstance(questions, list):
        raise UsageError(f"{file} has no list of questions", parameter="adapter")
    return frozenset(str(question) for question in questions)


def holds_no_adapter(folder: Path) -> bool:
    """Return whether a folder has no files, or only what `adapt` wrote before its first weights."""
    names = {file.name for file in folder.iterdir() if not _TEMPORARY.fullmatch(file.name)}
    return names <= {CONFIG_FILE}
