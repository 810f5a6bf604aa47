"""The configuration of a model directory, and what of it `mlx_lm` would ignore.

`mlx_lm` takes from config.json what an architecture's module knows and ignores the rest. A value
that changes what the model computes is handed on in the form that `mlx_lm` reads, or has no effect,
or is refused with its key.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from mlxroute.backend.model_files import read_json_object, read_tensors, weight_files
from mlxroute.errors import WeightsError
from mlxroute.safe_text import printable_line

_CONTEXT: Final = "max_position_embeddings"
CONTEXT_KEYS: Final = (
    *(_CONTEXT, "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    *("max_context_length", "model_max_length", "seq_length", "block_size"),
)
"""Keys of the number of positions of a model; the first that a configuration has counts."""
CONTEXT_NOTE: Final = "context_length"
"""The attribute of a loaded model that holds the number of positions it may use."""
LONGEST_CONTEXT: Final = 1 << 40
"""More positions than any model has."""
_PARTIAL: Final = "partial_rotary_factor"
# Keys that change what a model computes, and their values that do not. A module of `mlx_lm` that
# names the key follows it.
_COMPUTING: Final[Mapping[str, tuple[object, ...]]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "clip_qkv": (0,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rope_scaling": (),
    "rotary_pct": (1,),
    "scale_emb": (1,),
    "use_alibi": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
# Keys of generation_config.json that forbid, force or penalise tokens, and values that do not.
_DECODING: Final[Mapping[str, tuple[object, ...]]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
}
# Bounds far above any model, so that a damaged file does not fill the memory.
_BOUNDS: Final = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1 << 12),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size"), 1 << 22),
    "vocab_size": 1 << 26,
    _CONTEXT: LONGEST_CONTEXT,
}
# In the source of modules that have a window only in layers that the configuration names.
_FULL_BY_DEFAULT: Final = '["full_attention"] *'
# In the source of modules that scale RoPE as `rope_parameters` say.
_SCALED_BY_PARAMETERS: Final = re.compile(r"\bscaling_config=|\brope_parameters,")
# In the source of modules that scale RoPE in layers of full attention only.
_SCALED_IF_FULL: Final = re.compile(
    r'\brope_local_base_freq\b|!= "full_attention":\s+self\.rope = nn\.RoPE\('
)
_LONGEST_LIST: Final = 1 << 12
# Methods of other programs' quantised weights that `mlx_lm` converts.
_QUANT_METHODS: Final = (
    *("awq", "gptq", "bitnet", "compressed-tensors", "fp8", "modelopt", "mxfp4", "mxfp8"),
)


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a model directory, in the form that `mlx_lm` reads.

    End tokens are those of generation_config.json, if it names some. Raises WeightsError for files
    that cannot be read and for values out of bounds.
    """
    config = read_json_object(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise WeightsError(f"{path / 'config.json'} has no model_type")
    if (path / "generation_config.json").exists():
        eos_token_id = read_json_object(path / "generation_config.json").get("eos_token_id")
        config["eos_token_id"] = eos_token_id or config.get("eos_token_id")
    for table in (config, _text_config(config)):
        _complete_rope(table)
        _check_values(table, path)
    _check_quantization(config, path)
    if "tie_word_embeddings" not in config and "text_config" not in config and _has_head(path):
        # `mlx_lm` ties by default and would ignore the file's output layer.
        config["tie_word_embeddings"] = False
    return config


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a configuration names; None if it names none."""
    for table in (config, _text_config(config)):
        for key in CONTEXT_KEYS:
            value = table.get(key)
            if type(value) is int and 0 < value <= LONGEST_CONTEXT:
                return value
    return None


def ignored_generation_settings(path: Path) -> tuple[str, ...]:
    """Return the keys of a generation_config.json that ask for another answer than is written.

    Those of sampling are left out, as the caller sets it. Raises WeightsError for a file that
    cannot be read.
    """
    file = path / "generation_config.json"
    table = read_json_object(file) if file.exists() else {}
    return tuple(
        key
        for key, neutral in _DECODING.items()
        if (value := table.get(key)) is not None and value not in neutral
    )


def quantized_bits(config: Mapping[str, Any]) -> int:
    """Return the bits of a quantised weight; 4 if the configuration does not say."""
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    return int(quantization.get("bits") or 4)


def check_understood(config: Mapping[str, Any], architecture: ModuleType, path: Path) -> int | None:
    """Raise WeightsError, with its key, for a value that `architecture` ignores wrongly.

    Returns the number of positions within which an ignored sliding window changes nothing; None if
    there is no such window.
    """
    source = _source(architecture)
    table = {**_text_config(config), **config}
    rope = table.get("rope_parameters")
    if not _names(source, "rope_parameters") and not _is_flat_rope(rope, source):
        raise _refusal(path, "rope_parameters", rope, config)
    followed = _followed_rope(table, source)
    for key, neutral in _COMPUTING.items():
        value = table.get(key)
        if value is None or any(value == item for item in neutral) or _names(source, key):
            continue
        if value == followed.get(key):
            continue
        if key == "rope_scaling" and _rope_type(value) == "default":
            continue
        raise _refusal(path, key, value, config)
    for key in ("hidden_act", "hidden_activation"):
        value = table.get(key)
        if value not in (None, "silu", "swish", "swiglu") and _is_silu_only(source, key):
            raise _refusal(path, key, value, config)
    scaling = table.get("rope_scaling")
    if _has_other_factor(scaling) and not _names(source, "attention_factor"):
        raise _refusal(path, "rope_scaling", scaling, config)
    return _ignored_window(table, source)


def _refusal(path: Path, key: str, value: object, config: Mapping[str, Any]) -> WeightsError:
    shown = printable_line(repr(value), limit=60)
    return WeightsError(
        f"{path / 'config.json'}: {key} = {shown} is not supported by mlx_lm's"
        f" {config['model_type']} models; choose another model"
    )


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a multimodal configuration that describes the language model."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def _check_values(table: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for sizes out of bounds, long lists and end tokens that are not ids."""
    for key, value in table.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        most = _BOUNDS.get(key)
        too_long = isinstance(value, list) and len(value) > _LONGEST_LIST
        is_text = most is not None and isinstance(value, str)
        is_other = key == _CONTEXT and value is not None and not is_count
        if too_long or is_text or is_other or (most and is_count and not 0 <= value <= most):
            raise WeightsError(f"{path / 'config.json'}: {printable_line(key)} is out of bounds")
        if key in ("rope_theta", "rope_local_base_freq") and not (_is_finite(value) and value > 0):
            raise WeightsError(f"{path / 'config.json'}: {printable_line(key)} is out of bounds")
    ids = table.get("eos_token_id")
    items = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items):
        raise WeightsError(
            f"{path}: eos_token_id is {printable_line(repr(ids), limit=60)}, no token id and no"
            " list of them"
        )


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _complete_rope(table: dict[str, Any]) -> None:
    """Copy what newer files nest in `rope_parameters` to where most of `mlx_lm` reads it.

    YaRN scaling gets the context that it extends, for which `mlx_lm` has another default.
    """
    context = table.get(_CONTEXT)
    rope = _with_context(table.get("rope_parameters"), context)
    if isinstance(rope, dict):
        table["rope_parameters"] = {key: _with_context(v, context) for key, v in rope.items()}
    for key, value in _flat_rope(table.get("rope_parameters")).items():
        if table.get(key) is None:
            table[key] = value
    if "rope_scaling" in table:
        table["rope_scaling"] = _with_context(table["rope_scaling"], context)


def _with_context(scaling: Any, context: object) -> Any:
    key = "original_max_position_embeddings"
    if _rope_type(scaling) != "yarn" or scaling.get(key) is not None or not context:
        return scaling
    return {**scaling, key: context}


def _rope_by_layer(rope: Any) -> dict[str, dict[str, Any]]:
    """Return the `rope_parameters` of each kind of layer; empty if they are not nested."""
    values = rope if isinstance(rope, dict) else {}
    return {kind: value for kind, value in values.items() if isinstance(value, dict)}


def _flat_rope(rope: Any) -> dict[str, Any]:
    """Return what `rope_parameters` say, as far as older keys can."""
    if not isinstance(rope, dict):
        return {}
    kinds = _rope_by_layer(rope)
    own = kinds.get("full_attention", {}) if kinds else rope
    flat = {key: own[key] for key in ("rope_theta", _PARTIAL) if key in own}
    if any(kind.get(_PARTIAL) != own.get(_PARTIAL) for kind in kinds.values()):
        flat.pop(_PARTIAL, None)
    if scaling := _scaling(own):
        flat["rope_scaling"] = scaling
    if "rope_theta" in kinds.get("sliding_attention", {}):
        flat["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    return flat


def _is_flat_rope(rope: Any, source: str) -> bool:
    """Return whether a module that reads older keys does what `rope_parameters` say."""
    kinds = _rope_by_layer(rope)
    if kinds.keys() - {"full_attention", "sliding_attention"}:
        return False
    full, sliding = kinds.get("full_attention", {}), kinds.get("sliding_attention")
    if sliding is None:
        return True
    if full.get(_PARTIAL) != sliding.get(_PARTIAL):
        return False
    return _scaling(sliding) == ({} if _SCALED_IF_FULL.search(source) else _scaling(full))


def _followed_rope(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return values of older keys that a module follows without reading these keys."""
    if not _names(source, "rope_parameters"):
        return {"rope_local_base_freq": table.get("rope_theta")}
    flat = _flat_rope(table.get("rope_parameters"))
    is_scaled = _SCALED_BY_PARAMETERS.search(source)
    keys = ("rope_local_base_freq", "rope_scaling") if is_scaled else ("rope_local_base_freq",)
    return {key: flat[key] for key in keys if key in flat}


def _has_other_factor(scaling: Any) -> bool:
    """Return whether a scaling has an attention factor other than that of its formula."""
    if not isinstance(scaling, dict) or scaling.get("attention_factor") is None:
        return False
    factor, own = scaling.get("factor"), scaling["attention_factor"]
    if _rope_type(scaling) != "yarn" or not isinstance(factor, (int, float)) or factor <= 1:
        return True
    usual = 0.1 * math.log(factor) + 1
    return not (isinstance(own, (int, float)) and math.isclose(own, usual, rel_tol=1e-4))


def _scaling(rope: Any) -> dict[str, Any]:
    """Return the scaling of a table of RoPE settings; empty if it scales nothing."""
    if not isinstance(rope, dict) or _rope_type(rope) == "default":
        return {}
    return {key: value for key, value in rope.items() if key != "rope_theta"}


def _rope_type(scaling: Any) -> str:
    if not isinstance(scaling, dict):
        return ""
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _check_quantization(config: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for quantised weights that `mlx_lm` does not know."""
    file = path / "config.json"
    for key in ("quantization", "quantization_config"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise WeightsError(f"{file}: {key} is not a JSON object")
    if (own := config.get("quantization")) is not None:
        for key, most in {"bits": 8, "group_size": 1 << 16}.items():
            if type(own.get(key)) is not int or not 0 < own[key] <= most:
                raise WeightsError(f"{file}: quantization has no usable {key}")
    elif other := config.get("quantization_config"):
        method = other.get("quant_method")
        if method not in _QUANT_METHODS:
            raise WeightsError(
                f"{file}: quantization_config.quant_method = {printable_line(repr(method))} is not"
                " supported by mlx_lm; choose weights that mlx_lm has quantised"
            )


def _has_head(path: Path) -> bool:
    return any("lm_head.weight" in read_tensors(file) for file in weight_files(path))


@cache
def _source(architecture: ModuleType) -> str:
    """Return the source, without comments, of an architecture's module and those it builds on."""
    names = {
        value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
        for value in vars(architecture).values()
    }
    parts = [sys.modules.get(str(name)) for name in sorted(map(str, names))]
    others = [part for part in parts if hasattr(part, "ModelArgs") and part is not architecture]
    text = "\n".join(inspect.getsource(part) for part in (architecture, *others) if part)
    return re.sub("#.*", "", text)


def _names(source: str, key: str) -> bool:
    return re.search(rf"\b{key}\b", source) is not None


def _is_silu_only(source: str, key: str) -> bool:
    return "swiglu" in source and not _names(source, key) and not re.search("gelu|relu", source)


def _ignored_window(table: Mapping[str, Any], source: str) -> int | None:
    window = table.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or table.get("use_sliding_window") is False:
        return None
    by_layer = _FULL_BY_DEFAULT in source and not table.get("layer_types")
    if _names(source, "sliding_window") and not by_layer:
        return None
    layer_types = table.get("layer_types")
    if isinstance(layer_types, list) and "sliding_attention" not in layer_types:
        return None
    context = context_length(table)
    return window if context is None or window < context else None
