"""The endpoint as OpenAI's own Python package uses it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.http.listener import EndpointServer, bind
from mlxroute.small import SmallModel
from tests.support.endpoint import make_session

_MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def server(small: SmallModel) -> Iterator[tuple[str, EndpointServer]]:
    app = create_app(make_session(small, max_tokens=24))
    server = EndpointServer(app, on_second_signal=lambda: None)
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1", server
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(server: tuple[str, EndpointServer]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[0], api_key="none", max_retries=0) as client:
        yield client


def test_whole_and_streamed_answers(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="mlxroute", messages=_MESSAGES)
    stream = client.chat.completions.create(
        model="mlxroute",
        messages=_MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.model_extra is not None
    assert whole.model_extra["mlxroute"]["id"] == whole.id


def test_logprobs_and_text_completions(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="mlxroute",
        messages=_MESSAGES,
        logprobs=True,
        top_logprobs=2,
        extra_body={"budget": "3%", "exact": True},
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    texts = client.completions.create(model="mlxroute", prompt=["the", "fox"], logprobs=1)
    assert [choice.index for choice in texts.choices] == [0, 1]


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="gpt-4o", messages=_MESSAGES)
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(model="mlxroute", messages=_MESSAGES, n=3)
    assert info.value.param == "n"


def test_a_closed_stream_ends_its_answer(
    client: openai.OpenAI, server: tuple[str, EndpointServer]
) -> None:
    stream = client.chat.completions.create(
        model="mlxroute",
        messages=_MESSAGES,
        stream=True,
        max_tokens=400,
        temperature=1.5,
        seed=3,
    )
    next(iter(stream))
    stream.close()
    endpoint = server[1].config.app.state.endpoint  # type: ignore[union-attr]
    end_s = time.monotonic() + 10
    while endpoint.scheduler.figures().running and time.monotonic() < end_s:
        time.sleep(0.01)
    assert endpoint.scheduler.figures().running == 0
