"""Answer documents as bytes and as files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxroute.answers.document import FORMAT, VERSION, AnswerDocument
from mlxroute.answers.record_json import from_json, to_json
from mlxroute.errors import UsageError
from mlxroute.replace_file import find_target, write_private
from mlxroute.untrusted_text import MalformedText, TextFile, decode_text, parse_json
from mlxroute.user_folders import expand_user

_MAX_BYTES = 256 * 2**20
# Of a token that is part of a secret.
_NO_ID = -1
_REQUIRED_KEYS = {"role", "content"}


def format_document(
    document: AnswerDocument, *, redact: Callable[[Any], Any] = lambda value: value
) -> bytes:
    """Return a document as JSON: one key a line, one token and one reply a line.

    `redact` gets a JSON value and returns it without secrets, including those that the texts of a
    list form together; by default nothing is removed. If tokens spell a secret, they keep only
    the text around it, and the document loses its replies.
    """
    value = _redacted(document, redact)
    lines = [f"{json.dumps(key)}: {_format_value(item)}" for key, item in value.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def format_inline(
    document: AnswerDocument, *, redact: Callable[[Any], Any] = lambda value: value
) -> str:
    """Return a document as JSON on one line."""
    return _dump(_redacted(document, redact))


def _redacted(document: AnswerDocument, redact: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the JSON value of a document without secrets, and without tokens that spell one."""
    value: dict[str, Any] = redact(to_json(document))
    texts = [token.text for token in document.tokens]
    for token, before, after in zip(value["tokens"], texts, redact(texts), strict=True):
        if after != before:
            # Ids and candidates spell it too, as do the replies.
            token.update(id=_NO_ID, text=after, small=None, large=None)
            value["replies"] = []
    return value


def _format_value(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(map(_dump, value)) + "\n]"
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ":"))


def parse_document(data: bytes) -> AnswerDocument:
    """Return the document of its JSON. Raises UsageError for anything else."""
    try:
        value = parse_json(decode_text(data))
    except MalformedText as error:
        raise UsageError(str(error)) from error
    return read_document(value)


def read_document(value: Any) -> AnswerDocument:
    """Return the document of a JSON value. Raises UsageError for anything else."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f'it has no "format": "{FORMAT}"')
    version = value.get("version")
    if version != VERSION or isinstance(version, bool):
        raise UsageError(f'"version" is not {VERSION}; a newer mlxroute may read it')
    document = from_json(AnswerDocument, value)
    for number, message in enumerate(document.messages):
        if not message.keys() >= _REQUIRED_KEYS:
            raise UsageError(f'messages[{number}] has no "role" or no "content"')
    if not document.messages and document.prompt.text is None:
        raise UsageError("messages is empty")
    if [token.index for token in document.tokens] != list(range(len(document.tokens))):
        raise UsageError("tokens are not numbered from 0")
    for number, reply in enumerate(document.replies):
        if not 0 <= reply.after <= len(document.tokens):
            raise UsageError(f"replies[{number}].after is not a position of the answer")
        if not all(token.ids for token in reply.tokens):
            raise UsageError(f"replies[{number}] has a token without ids")
    return document


def load_document(path: Path) -> AnswerDocument:
    """Read a document from a file. Raises UsageError if it does not hold one."""
    path = expand_user(path)
    text = TextFile(path, "the saved answer", max_bytes=_MAX_BYTES).read()
    try:
        return parse_document(text.encode())
    except UsageError as error:
        raise UsageError(f"{path} is not a saved answer that this version reads: {error}") from None


def check_target(path: Path) -> Path:
    """Return the path of a file to save a document to.

    Raises UsageError if it cannot be written, or if it exists and holds something else; a pipe is
    not read.
    """
    path = find_target(expand_user(path))
    if os.path.lexists(path):
        try:
            load_document(path)
        except UsageError:
            raise UsageError(
                f"{path} exists and is not a saved answer; choose another name"
            ) from None
    return path


def save_document(
    document: AnswerDocument, path: Path, *, redact: Callable[[Any], Any] = lambda value: value
) -> None:
    """Write a document to a file in one step, readable by its owner only.

    Raises UsageError if that fails, or if the file exists and holds something else.
    """
    write_private(check_target(path), format_document(document, redact=redact))
