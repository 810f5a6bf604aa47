"""Bodies of replies: events or one JSON value, and the line ends of events."""

from __future__ import annotations

import pytest

from mlxroute.large.dialects.sse import is_event_stream, parse_events

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_events_end_at_each_of_their_line_ends(end: bytes, mark: bytes) -> None:
    body = mark + b"data: " + '{"content":"a\u2028b\x85c"}'.encode() + end + b"data: [DONE]" + end
    assert is_event_stream(body)
    assert parse_events(body) == [{"content": "a\u2028b\x85c"}]
    assert parse_events(body[:20]) == []


@pytest.mark.parametrize("body", [b"", b"{}", MARK + b"{}", b" [1]", b"null", b"<html>", b"\xff"])
def test_what_does_not_begin_with_a_field_is_no_event_stream(body: bytes) -> None:
    assert not is_event_stream(body)
