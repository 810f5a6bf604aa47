"""The page as one HTML document, which loads nothing but replies of its own server."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Final

from mlxroute.view.answer_html import read_token_view

_SCRIPTS: Final = ("endpoint_client.js", "answer_panel.js", "chat_page.js")


@dataclass(frozen=True, slots=True)
class ChatPage:
    """The page.

    Args:
        html: The document.
        headers: The headers that it must have: a browser then runs no other script.
    """

    html: str
    headers: dict[str, str]


def read_chat_page() -> ChatPage:
    """Return the page."""
    style = _read("page.css")
    script = "\n".join([read_token_view(), *map(_read, _SCRIPTS)])
    policy = (
        "default-src 'none'",
        f"script-src {_source_of(script)}",
        f"style-src {_source_of(style)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A page of an earlier version must not talk to a later endpoint.
        "Cache-Control": "no-cache",
    }
    html = Template(_read("index.html")).substitute(style=style, script=script)
    return ChatPage(html, headers)


def _source_of(text: str) -> str:
    """Return the source of a policy that allows an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (files("mlxroute.serving.http.page") / name).read_text(encoding="utf-8")
