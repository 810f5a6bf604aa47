"""A saved answer as one self-contained page, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from html import escape
from importlib.resources import files
from string import Template

from mlxroute.answers.document import AnswerDocument
from mlxroute.answers.record_json import to_json
from mlxroute.safe_text import printable, printable_line

_START = """
showDocument(JSON.parse(document.getElementById("answer").textContent),
  document.querySelector("main"));
"""
_TITLE_CHARACTERS = 80


def read_token_view() -> str:
    """Return the source of the JavaScript module that shows tokens."""
    return _read_static("token_view.js")


def is_page(text: str) -> bool:
    """Return whether a text is a page that `draw_page` returned."""
    return text.startswith(_read_static("answer.html").partition("$script_hash")[0])


def draw_page(document: AnswerDocument) -> str:
    """Return the page of an answer. The recorded replies are left out."""
    script = read_token_view() + _START
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(to_json(replace(document, replies=())), ensure_ascii=False)
    return Template(_read_static("answer.html")).substitute(
        title=escape(printable_line(document.question, limit=_TITLE_CHARACTERS)),
        text=escape(printable(document.summary.text)),
        # In HTML, only "<" can end the element.
        data=data.replace("<", "\\u003c"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def _read_static(name: str) -> str:
    return (files("mlxroute.view") / "static" / name).read_text(encoding="utf-8")
