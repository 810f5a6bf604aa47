"""The page at `/` as it is served: one document that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.testclient import TestClient

from mlxroute.serving.http.guard import AccessRules
from mlxroute.small import SmallModel
from tests.support.endpoint import make_session, running


def test_only_the_script_and_the_style_of_the_page_are_allowed(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_names_no_other_host(client: TestClient) -> None:
    addresses = re.findall(r"https?://[^'\"\s]*|src=|@import", client.get("/").text)
    assert addresses == ["http://www.w3.org/2000/svg"]


def test_the_page_is_served_without_a_key(small: SmallModel) -> None:
    with running(make_session(small), rules=AccessRules(keys=["sesame-0123456789"])) as client:
        assert client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 401
