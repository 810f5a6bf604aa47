"""Servers that already run on this machine, found by the ports they listen on by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.json_fields import as_object, as_text, listed_items
from mlxroute.large.http.loopback_get import get_from_ports

DEFAULT_PORTS: Final[Mapping[int, str]] = {
    11434: "Ollama",
    8080: "llama-server or mlx_lm.server",
    8000: "vLLM",
    1234: "LM Studio",
    8081: "mlx_lm.server",
    30000: "SGLang",
}
"""The default ports of known servers, with their names, in the order in which they are offered."""
TIMEOUT_S: Final = 0.3
# Names by the `owned_by` of a listed model, which is surer than the port.
_NAME_BY_OWNER: Final = {
    "library": "Ollama",
    "llamacpp": "llama-server",
    "sglang": "SGLang",
    "vllm": "vLLM",
}


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server on this machine that lists models; its texts are not trusted.

    Args:
        name: Its kind, as the list of models names it, or a phrase with its port.
        url: Its address, as `--large` takes it.
        models: Ids of the models that it lists.
    """

    name: str
    url: str
    models: tuple[str, ...]

    @property
    def writers(self) -> tuple[str, ...]:
        """The models that can write text, as far as their names show it: those not for embedding.

        All models if that leaves none.
        """
        return tuple(name for name in self.models if "embed" not in name.lower()) or self.models


def find_running_servers() -> tuple[RunningServer, ...]:
    """Ask the default ports of known servers for `/v1/models`, all at once, in 0.3 s in all."""
    bodies = get_from_ports(tuple(DEFAULT_PORTS), "/v1/models", timeout_s=TIMEOUT_S)
    servers = (_running_server(port, bodies[port]) for port in DEFAULT_PORTS if port in bodies)
    return tuple(server for server in servers if server is not None)


def _running_server(port: int, body: bytes) -> RunningServer | None:
    """Return the server that sent a reply; None if the reply lists no models."""
    try:
        items = [as_object(entry, what="a model") for entry in listed_items(body)]
        names = [as_text(item.get("id"), what="a model's id") for item in items]
    except LargeProtocolError:
        return None
    models = tuple(filter(None, names))
    if not models:
        return None
    owner = items[0].get("owned_by")
    name = _NAME_BY_OWNER.get(owner) if isinstance(owner, str) else None
    # A port alone shows little: any server may listen on it.
    name = name or f"a server on the port of {DEFAULT_PORTS[port]}"
    return RunningServer(name, f"http://127.0.0.1:{port}/v1", models)
