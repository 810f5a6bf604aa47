"""A tokenizer read without transformers gives what mlx_lm's own gives, or is not used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxroute.backend.load import load
from mlxroute.catalog import Catalog
from mlxroute.errors import WeightsError
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer
from mlxroute.types import no_notice, no_progress
from mlxroute.weights import resolve
from tests.conftest import CACHE_DIR
from tests.support.gguf_files import TinyModel, write_gguf
from tests.support.tiny import START, make_tiny_model

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@functools.cache
def _resolved(spec: str, cache_dir: Path) -> Path:
    options: dict[str, Any] = {"progress": no_progress, "notify": no_notice}
    catalog = Catalog.load()
    return resolve(spec, catalog=catalog, cache_dir=cache_dir, offline=False, **options).path


@functools.cache
def _both(path: Path) -> tuple[FastTokenizer, Any]:
    fast = FastTokenizer.read(path, eos_token_ids=[0])
    assert fast is not None
    return fast, fast.read_in_full()


@pytest.fixture(scope="module", params=["tiny", "converted", "smollm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    match request.param:
        case "tiny":
            return make_tiny_model(made / "tiny")
        case "converted":
            return _resolved(str(write_gguf(made / "tiny.gguf", TinyModel())), made)
        case _:
            return _resolved("smollm2-135m", CACHE_DIR)


def test_the_vocabulary_is_that_of_transformers(folder: Path) -> None:
    fast, full = _both(folder)
    assert len(fast) == len(full)
    assert fast.get_vocab() == full.get_vocab()
    assert set(fast.all_special_ids) == set(full.all_special_ids)
    assert fast.eos_token_ids == full.eos_token_ids
    assert fast.eos_token_id == full.eos_token_id
    assert (fast.bos_token, fast.bos_token_id) == (full.bos_token, full.bos_token_id)
    assert fast.has_chat_template == full.has_chat_template
    contents = [
        {int(i): (token.content, token.special) for i, token in t.added_tokens_decoder.items()}
        for t in (fast, full)
    ]
    assert contents[0] == contents[1]
    ids = [0, len(fast) - 1, len(fast) + 5]
    pieces = [[t.convert_ids_to_tokens(i) for i in ids[:2]] for t in (fast, full)]
    assert pieces[0] == pieces[1]


@settings(max_examples=40)
@given(text=_TEXTS, special=st.booleans(), split=st.booleans())
@example(text=f"{START}user\nhi<|im_end|> <|im_start|>", special=True, split=False)
@example(text=f"{START}user\nhi<|im_end|> <|im_start|>", special=False, split=True)
def test_texts_are_encoded_as_by_transformers(
    folder: Path, text: str, special: bool, split: bool
) -> None:
    fast, full = _both(folder)
    options = {"add_special_tokens": special, "split_special_tokens": split}
    assert fast.encode(text, **options) == full.encode(text, **options)


@settings(max_examples=20)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=4), system=st.booleans())
def test_conversations_are_rendered_as_by_transformers(
    folder: Path, texts: list[str], system: bool
) -> None:
    fast, full = _both(folder)
    roles = (["system"] if system else []) + ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    rendered = [ChatTokenizer(t, name="m").encode_conversation(messages).text for t in (fast, full)]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[0]['content'] | tojson }}{{ pad_token is defined }}",
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {{ m.content }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ missing.field }}",
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ add_generation_prompt }}",
    ],
)
def test_templates_run_in_the_same_environment(tmp_path: Path, template: str) -> None:
    folder = make_tiny_model(tmp_path / "m")
    _change_config(folder, lambda config: config | {"chat_template": template})
    fast = FastTokenizer.read(folder, eos_token_ids=None)
    assert fast is not None
    outcomes = []
    for tokenizer in (fast, fast.read_in_full()):
        try:
            messages = [{"role": "user", "content": 'é"<'}, {"role": "user", "content": "b"}]
            outcomes.append(ChatTokenizer(tokenizer, name="m").encode_conversation(messages).text)
        except Exception as exc:  # noqa: BLE001
            outcomes.append(f"{type(exc)} {exc}")
    assert outcomes[0] == outcomes[1]


def _change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"tokenizer_class": "LlamaTokenizer"},
        lambda config: config | {"add_bos_token": True},
        lambda config: config | {"bos_token": {"content": "<s>"}},
        lambda config: config | {"bos_token": "<not in the vocabulary>"},
        lambda config: config | {"chat_template": "{% if enable_thinking %}a{% endif %}"},
        lambda config: config | {"chat_template": "{% generation %}a{% endgeneration %}"},
        lambda config: [],
    ],
)
def test_settings_that_only_transformers_follows_are_left_to_it(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = make_tiny_model(tmp_path / "m")
    _change_config(folder, change)
    assert FastTokenizer.read(folder, eos_token_ids=None) is None


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
def test_files_that_only_transformers_reads_are_left_to_it(tmp_path: Path, name: str) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / name).write_text("{}")
    assert FastTokenizer.read(folder, eos_token_ids=None) is None


def test_a_broken_tokenizer_is_left_to_transformers(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    assert FastTokenizer.read(folder, eos_token_ids=None) is None


def _change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("function", ["load", "load_tokenizer"])
def test_a_tokenizer_at_which_the_library_panics_is_a_weights_error(
    tmp_path: Path, is_plain: bool, function: str
) -> None:
    folder = make_tiny_model(tmp_path / "m")
    if not is_plain:
        _change_config(folder, lambda config: config | {"add_bos_token": True})
    _change_tokenizer(folder, lambda t: t["model"].update(continuing_subword_prefix="####"))
    with pytest.raises(WeightsError, match=r"tokenizer of .* cannot be read") as caught:
        load(folder) if function == "load" else ChatTokenizer.load(folder, name="m")
    assert "\n" not in str(caught.value)
