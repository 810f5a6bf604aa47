"""A model's tokenizer, read by the `tokenizers` library alone.

`mlx_lm` reads it with transformers, whose import and reading take seconds. For plain tokenizers,
such as those converted from GGUF files, the results are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from mlxroute.errors import WeightsError
from mlxroute.safe_text import error_text
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json

# The settings of tokenizer_config.json that this module understands.
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = {*_ROLES, "chat_template", "model_max_length", "clean_up_tokenization_spaces"}
_CLASS = "PreTrainedTokenizerFast"
_MAX_BYTES: Final = 64 << 20
# Files that add to tokenizer.json and tokenizer_config.json, or replace parts of them.
_OTHER_FILES = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
)
# What only transformers renders: its own block tag, and switches whose names differ.
_SPECIAL_TEMPLATE_WORDS = ("generation %}", "generation -%}", "think")


class FastTokenizer:
    """The part of `mlx_lm`'s TokenizerWrapper that mlxroute uses, under the same names.

    Args:
        backend: The `tokenizers.Tokenizer`.
        path: Folder of its files.
        config: Contents of tokenizer_config.json.
        eos_token_ids: Ids that end an answer, besides that of `eos_token`.

    Attributes:
        backend_tokenizer: As `backend`.
        bos_token: The begin token; None if there is none.
        chat_template: The chat template; None if there is none.
        has_chat_template: Whether conversations can be rendered.
    """

    def __init__(
        self, backend: Any, *, path: Path, config: Mapping[str, Any], eos_token_ids: Iterable[int]
    ) -> None:
        self.backend_tokenizer = backend
        self._path = path
        self.chat_template: str | None = config.get("chat_template")
        self._roles = {role: config[role] for role in _ROLES if role in config}
        self._eos_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self.bos_token: str | None = self._roles.get("bos_token")
        self.has_chat_template = self.chat_template is not None

    @classmethod
    def read(cls, path: Path, *, eos_token_ids: int | Iterable[int] | None) -> Self | None:
        """Read the tokenizer of a model directory; return None if only transformers can.

        A file that cannot be read is left to transformers too, which raises the error. Raises
        WeightsError for one at which the library panics.
        """
        from tokenizers import Tokenizer

        config = read_plain_tokenizer_config(path)
        if config is None:
            return None
        try:
            with _panics_as_errors(path):
                backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        except WeightsError:
            raise
        except Exception:  # noqa: BLE001  The library raises Exception itself.
            return None
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        if not special.issuperset(config[role] for role in _ROLES if role in config):
            return None
        if isinstance(eos_token_ids, int):
            eos_token_ids = [eos_token_ids]
        return cls(backend, path=path, config=config, eos_token_ids=eos_token_ids or ())

    def read_in_full(self) -> Any:
        """Return `mlx_lm`'s TokenizerWrapper for the same files."""
        return load_full_tokenizer(self._path, eos_token_ids=list(self._eos_ids) or None)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a role, by role: variables of the chat template."""
        return dict(self._roles)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the tokens with a role."""
        return [self.backend_tokenizer.token_to_id(token) for token in self._roles.values()]

    @property
    def bos_token_id(self) -> int | None:
        """The id of the begin token; None if there is none."""
        return None if self.bos_token is None else self._id(self.bos_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id that stands for an unknown character; None if there is none."""
        return None if "unk_token" not in self._roles else self._id(self._roles["unk_token"])

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token; None if there is none."""
        return None if "eos_token" not in self._roles else self._id(self._roles["eos_token"])

    @property
    def eos_token_ids(self) -> set[int]:
        """The ids that end an answer."""
        own = self.eos_token_id
        return {*self._eos_ids, *([] if own is None else [own])}

    @eos_token_ids.setter
    def eos_token_ids(self, ids: Iterable[int]) -> None:
        self._eos_ids = tuple(sorted(ids))

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by piece, added tokens included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """Return the piece of an id."""
        piece: str | None = self.backend_tokenizer.id_to_token(token_id)
        return piece

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add what the tokenizer puts around a text, such as a
                begin token.
            split_special_tokens: Whether special tokens in the text are ordinary text.
        """
        with self._lock:
            if self.backend_tokenizer.encode_special_tokens != split_special_tokens:
                self.backend_tokenizer.encode_special_tokens = split_special_tokens
            encoding = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def _id(self, token: str) -> int:
        return int(self.backend_tokenizer.token_to_id(token))


def load_full_tokenizer(path: Path, *, eos_token_ids: int | list[int] | None = None) -> Any:
    """Return `mlx_lm`'s TokenizerWrapper for the files of a model directory; runs no code in them.

    Raises what transformers raises for files that it cannot read, and WeightsError for those at
    which the tokenizers library panics.
    """
    from mlx_lm.tokenizer_utils import load

    # Without this transformers asks the user whether to run the code.
    settings = {"trust_remote_code": False}
    with _panics_as_errors(path):
        return load(path, tokenizer_config_extra=settings, eos_token_ids=eos_token_ids)


@contextmanager
def _panics_as_errors(path: Path) -> Iterator[None]:
    """Translate a panic of the tokenizers library, which is written in Rust, to WeightsError."""
    try:
        yield
    except BaseException as exc:
        # It is no Exception, and its class cannot be imported.
        if type(exc).__name__ != "PanicException":
            raise
        raise WeightsError(f"the tokenizer of {path} cannot be read: {error_text(exc)}") from exc


def read_plain_tokenizer_config(path: Path) -> dict[str, Any] | None:
    """Return the tokenizer_config.json of a model directory if a FastTokenizer follows all of it.

    None for any other, or if it cannot be read.
    """
    if any((path / name).exists() for name in _OTHER_FILES):
        return None
    file = TextFile(path / "tokenizer_config.json", "the model's file", _MAX_BYTES, WeightsError)
    try:
        config = parse_json(file.read(), strict=False)
    except (WeightsError, MalformedText):
        return None
    return config if _is_plain(config) else None


def _is_plain(config: Any) -> bool:
    """Return whether this module understands everything in a tokenizer_config.json."""
    if not isinstance(config, dict) or config.keys() - _SETTINGS != {"tokenizer_class"}:
        return False
    texts = [config[key] for key in (*_ROLES, "chat_template") if key in config]
    if config["tokenizer_class"] != _CLASS or not all(isinstance(text, str) for text in texts):
        return False
    template = config.get("chat_template", "")
    return not any(word in template for word in _SPECIAL_TEMPLATE_WORDS)
