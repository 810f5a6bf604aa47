"""Addresses as users type them: one host for every parser, and no secret in a message."""

from __future__ import annotations

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.large import LargeModel
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.connections import Auth
from mlxroute.ledger import Ledger
from tests.support.loopback import Loopback, Reply


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("http://host:0/v1", "from 1 to 65535"),
        ("http://host:65536/v1", "from 1 to 65535"),
        ("http://host:-1/v1", "host or port"),
        ("http://host:８０/v1", "host or port"),
        ("http://[::1]extra/v1", "host or port"),
        ("http://[v1.x]/v1", "host or port"),
        ("http://[fe80::1%25]]/v1", "host or port"),
        ("http://[fe80::zz]/v1", "not a URL"),
        ("http://[fe80::1%25a b]/v1", "space"),
        ("http://ho\\st/v1", "backslash"),
        ("http://127.0.0.1\\@host/v1", "backslash"),
        ("http://host/v1\\", "backslash"),
        ("http://%68ost/v1", "character"),
        ("http://-host/v1", "character"),
        ("http://ho$t/v1", "character"),
        ("http://ho\u200bst/v1", "control character"),
        ("http://ho\u00a0st/v1", "control character"),
        ("http://host/v1\x1b[2J", "control character"),
        ("http://host/v1#top", "without"),
        ("http://us%3Aer:word@host/v1", "colon"),
        ("http://\u0300host/v1", "not valid"),
    ],
)
def test_an_address_that_parsers_could_read_differently_is_refused(typed: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_address(typed)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("  http://host:8081\n", "http://host:8081/v1"),
        ("http://bücher.example:80", "http://xn--bcher-kva.example:80/v1"),
        ("http://ＨＯＳＴ/v1", "http://host/v1"),
        ("http://my_box:8000", "http://my_box:8000/v1"),
        ("http://host.:8000", "http://host.:8000/v1"),
        ("http://host:/v1", "http://host/v1"),
        ("http://[fe80::1%25eth0]:80/v1", "http://[fe80::1%25eth0]:80/v1"),
        ("http://[fe80::1%eth0]:80/v1", "http://[fe80::1%25eth0]:80/v1"),
        ("http://me:word@host/v1", "http://host/v1"),
        ("http://@host/v1", "http://host/v1"),
    ],
)
def test_an_address_has_the_same_host_for_requests(typed: str, url: str) -> None:
    address = parse_address(typed)
    assert address.url == url
    assert requests.Request("GET", url).prepare().url == url


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *((host, True) for host in ("localhost", "LocalHost.", "a.localhost", "127.0.0.1")),
        *((host, True) for host in ("127.1", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::]")),
        *((host, True) for host in ("[::ffff:127.0.0.1]", "[::1%25lo]", "ⓛocalhost")),
        *((host, False) for host in ("localhost.example", "notlocalhost", "10.0.0.1", "128.1")),
        *((host, False) for host in ("[fe80::1%25eth0]", "[::ffff:10.0.0.1]", "127.0.0.1.nip.io")),
    ],
)
def test_servers_on_this_machine_are_known_by_every_name(host: str, is_loopback: bool) -> None:
    assert parse_address(f"http://{host}:8000/v1").is_loopback is is_loopback


@pytest.mark.parametrize(
    "typed",
    [
        *("http://me:s3c/ret@host/v1", "http:/me:s3cret@host/v1", "http://me:s3cret＠host/v1"),
        *("http://me:s3c ret@host/v1", "http://me:s3c#ret@host", "http://me:s3c?ret@host/v1"),
        *(
            "http:me:s3cret@host",
            "me:s3cret@host",
            "s3cret@host",
            "http://me:s3cret@ho$t",
            "//me:s3cret@x",
        ),
        *("http://host/v1?api_key=s3cret", "http://host/v1#s3cret", "http://me:s3cret﹫host/v1"),
        *("http://me:s3cret@host:99999", "ftp://me:s3cret@host/v1", "http://me:s3cret@h@ost:x/"),
    ],
)
def test_no_part_of_a_mistyped_address_that_may_be_secret_is_shown(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(typed)
    assert not any(part in str(caught.value) for part in ("s3c", "ret@"))


@given(st.text(max_size=40) | st.text(alphabet="htp:/@[]%25.#?\\ a1é\n", max_size=40))
def test_any_text_is_an_address_or_one_line_that_says_why_not(typed: str) -> None:
    for text in (typed, f"http://{typed}", f"http://me:word@{typed}"):
        try:
            address = parse_address(text)
        except UsageError as exc:
            message = str(exc)
        else:
            message = address.url
            assert "@" not in message.partition("//")[2].partition("/")[0]
            requests.Request("GET", address.url).prepare()
        assert message.isprintable()


# Who gets which secret


def header(typed: str, api_key: str | None) -> str | None:
    request = requests.Request("GET", "http://host/").prepare()
    return Auth(parse_address(typed), api_key)(request).headers.get("Authorization")


@pytest.mark.parametrize(
    ("typed", "key", "sent"),
    [
        ("http://me:pw@host", "sk-real", "Basic bWU6cHc="),
        ("http://me:pw@host", None, "Basic bWU6cHc="),
        ("http://host", "sk-real", "Bearer sk-real"),
        ("http://@host", "sk-real", "Bearer sk-real"),
        ("http://host", None, None),
        # A password of bytes that are not UTF-8, and one that Latin-1 lacks.
        ("http://me:%ff@host", None, "Basic bWU6/w=="),
        ("http://me:ż@host", None, "Basic bWU6xbw="),
    ],
)
def test_the_user_and_password_of_the_address_win_over_a_key(
    typed: str, key: str | None, sent: str | None
) -> None:
    assert header(typed, key) == sent


def test_the_password_or_a_token_as_the_user_is_redacted_everywhere() -> None:
    with Loopback(lambda request: Reply.of({"error": request.headers["authorization"]})) as server:
        for userinfo in ("me:p%40ssword", "tokenword"):
            ledger = Ledger()
            typed = server.url.replace("//", f"//{userinfo}@")
            with LargeModel(typed, api_key="sk-other", ledger=ledger) as large:
                transport = large._transport
                secret = userinfo.rpartition(":")[2].replace("%40", "@")
                assert transport.redact(f"no: {secret}") == "no: [key]"
                assert ledger.secrets.redact_json([secret]) == ["[key]"]
                assert secret not in repr(large) + large.base_url
