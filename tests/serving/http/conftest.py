"""A tiny model, and an endpoint of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from mlxroute.backend.load import load
from mlxroute.small import SmallModel
from tests.support.endpoint import make_session, running
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    path = make_tiny_model(tmp_path_factory.mktemp("endpoint") / "tiny")
    return SmallModel(*load(path), name="tiny")


@pytest.fixture(scope="package")
def client(small: SmallModel) -> Iterator[TestClient]:
    with running(make_session(small)) as client:
        yield client
