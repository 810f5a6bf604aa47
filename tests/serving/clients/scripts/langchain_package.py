"""Uses an endpoint with langchain-openai; prints what it got as JSON."""

import asyncio
import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

URL = sys.argv[1]
QUESTION = "Count to five."
COMMON: dict[str, Any] = {
    "base_url": URL,
    "api_key": "none",
    "model": "mlxroute",
    "max_tokens": 6,
    "temperature": 0,
}
chat = ChatOpenAI(**COMMON)
completion = OpenAI(**COMMON)


async def streamed() -> str:
    """Return the text of an answer, streamed asynchronously."""
    return "".join([chunk.text async for chunk in chat.astream(QUESTION)])


def refusal() -> str:
    """Return the message of the error for a schema."""
    schema = {"title": "name", "type": "object", "properties": {"name": {"type": "string"}}}
    try:
        chat.with_structured_output(schema).invoke("Name a fruit.")
    except Exception as exc:  # noqa: BLE001 - the test looks at it
        return str(exc)
    return ""


whole = chat.invoke(QUESTION)
chunks = list(chat.stream(QUESTION, stream_usage=True))
result = {
    "text": whole.text,
    "usage": whole.usage_metadata,
    "streamed": "".join(chunk.text for chunk in chunks),
    "streamed_usage": [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata],
    "async_streamed": asyncio.run(streamed()),
    "batch": [reply.text for reply in chat.batch([QUESTION] * 3)],
    "completion": completion.invoke("One, two,"),
    "streamed_completion": "".join(completion.stream("One, two,")),
    "refusal": refusal(),
}
sys.stdout.write(json.dumps(result))
