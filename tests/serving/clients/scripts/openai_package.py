"""Uses an endpoint with OpenAI's package; prints what it got as JSON."""

import asyncio
import json
import sys
from typing import Any

import openai

URL = sys.argv[1]
ASKED: dict[str, Any] = {
    "model": "mlxroute",
    "messages": [{"role": "user", "content": "Count to five."}],
    "max_tokens": 8,
}


def whole_and_streamed(client: openai.OpenAI) -> dict[str, Any]:
    """Return the text, the sources and the usage of one answer, whole and streamed."""
    reply = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    streamed, usage = "", None
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**ASKED, **streaming):
        usage = chunk.usage or usage
        for part in chunk.choices:
            streamed += part.delta.content or ""
    return {
        "models": [model.id for model in client.models.list()],
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "sources": [entry.model_dump()["source"] for entry in choice.logprobs.content],
        "summary": reply.model_dump()["mlxroute"],
        "streamed": streamed,
        "streamed_usage": usage.model_dump() if usage else None,
    }


def streamed_events(client: openai.OpenAI) -> list[str]:
    """Return the kinds of events that the package's own reader of streams makes."""
    with client.chat.completions.stream(**ASKED) as stream:
        return [event.type for event in stream]


async def several_and_cancelled() -> dict[str, Any]:
    """Return answers written at a time, and the end of one whose client has left."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as client:
        create = client.chat.completions.create
        replies = await asyncio.gather(*[create(**ASKED) for _ in range(4)])
        stream = await create(**{**ASKED, "max_tokens": 400}, stream=True)
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                await stream.close()
                break
        return {
            "texts": [reply.choices[0].message.content for reply in replies],
            "cancelled": await _finish_reason(client, chunk.id),
        }


async def _finish_reason(client: openai.AsyncOpenAI, answer_id: str) -> str:
    for _ in range(100):
        try:
            document: Any = await client.get(f"/mlxroute/answers/{answer_id}", cast_to=object)
        except openai.NotFoundError:
            await asyncio.sleep(0.1)
        else:
            return str(document["summary"]["finish_reason"])
    raise TimeoutError("the answer did not end")


def refused(client: openai.OpenAI) -> list[tuple[str, str | None]]:
    """Return the kind of error and the parameter for requests that are refused."""
    errors = []
    for changed in ({"n": 2}, {"presence_penalty": 1}, {"model": "gpt-4"}):
        try:
            client.chat.completions.create(**{**ASKED, **changed})
        except openai.APIStatusError as exc:
            errors.append((type(exc).__name__, exc.param))
    return errors


with openai.OpenAI(base_url=URL, api_key="none", max_retries=0) as shared_client:
    result = {
        **whole_and_streamed(shared_client),
        "events": streamed_events(shared_client),
        **asyncio.run(several_and_cancelled()),
        "refused": refused(shared_client),
    }
sys.stdout.write(json.dumps(result))
