"""A proxy in front of a server that leaves only its chat route, without partial answers.

It makes a server that is at hand one that only chats, as most providers' servers are. Run it with

    python -m mlxroute.bench.chat_only_server http://127.0.0.1:8081/v1 8082
"""

from __future__ import annotations

import json
import sys
from typing import Final

from mlxroute.bench.loopback_proxy import LoopbackProxy

# Fields of a chat request that every provider knows; others would continue a partial answer.
_FIELDS: Final = {"model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs"}
_NOT_FOUND: Final = (404, [b'{"error": {"message": "Not Found"}}'])


class ChatOnlyServer(LoopbackProxy):
    """A loopback proxy that passes on the list of models and chat requests.

    A request that begins the answer is refused, as is one with an unusual field.
    """

    @property
    def url(self) -> str:
        """The URL to use instead of `upstream`."""
        return f"{self.root_url}/v1"

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, list[bytes]]:
        """Return the status and the body of the reply to a request, as its only part."""
        if (method, path) == ("GET", "/v1/models"):
            return self._pass_on(method, "/models", body)
        if (method, path) != ("POST", "/v1/chat/completions"):
            return _NOT_FOUND
        request = json.loads(body)
        if (unknown := set(request) - _FIELDS) or request["messages"][-1]["role"] != "user":
            text = (
                f"unknown field {min(unknown)}" if unknown else "the last message must be a user's"
            )
            return 400, [json.dumps({"error": {"message": text}}).encode()]
        return self._pass_on(method, "/chat/completions", body)

    def _pass_on(self, method: str, path: str, body: bytes) -> tuple[int, list[bytes]]:
        status, content = self.forward(method, self.upstream_url + path, body)
        return status, [content]


if __name__ == "__main__":
    ChatOnlyServer(sys.argv[1], port=int(sys.argv[2])).serve()
