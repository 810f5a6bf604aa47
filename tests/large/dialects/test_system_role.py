"""System messages: sent as they are until a server has refused them for certain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects.system_role import SystemRole
from mlxroute.large.prompt import Prompt
from mlxroute.types import Message

SYSTEM: Message = {"role": "system", "content": "one"}
USER: Message = {"role": "user", "content": "hi"}
PROMPT = Prompt(messages=(SYSTEM, USER))


class Server:
    """Refuses with these statuses in order; 0 and everything after them are answered."""

    def __init__(self, statuses: Sequence[int] = (), *, takes_system: bool = True) -> None:
        self.statuses = list(statuses)
        self.takes_system = takes_system
        self.roles: list[str] = []

    def send(self, prompt: Prompt) -> str:
        role = prompt.messages[0]["role"]
        self.roles.append(role)
        status = self.statuses.pop(0) if self.statuses else 0
        if not self.takes_system and role == "system":
            status = 400
        if status:
            raise LargeRefused("no", status=status)
        return role


@pytest.mark.parametrize("status", [400, 422, 500])
def test_one_refusal_changes_no_conversation(status: int) -> None:
    system_role, server = SystemRole(), Server([status])
    assert [system_role.send(PROMPT, server.send, server=server) for _ in range(3)] == [
        "system"
    ] * 3


def test_a_server_that_took_a_system_message_refuses_something_else() -> None:
    system_role, server = SystemRole(), Server([0, 400, 400, 400])
    system_role.send(PROMPT, server.send, server=server)
    for _ in range(3):
        with pytest.raises(LargeRefused):
            system_role.send(PROMPT, server.send, server=server)
    assert system_role.send(PROMPT, server.send, server=server) == "system"
    assert set(server.roles) == {"system"}


def test_a_server_without_a_system_role_is_sent_none_from_then_on() -> None:
    system_role, server = SystemRole(), Server(takes_system=False)
    assert [system_role.send(PROMPT, server.send, server=server) for _ in range(3)] == ["user"] * 3
    assert server.roles == ["system", "system", "user", "user", "user"]


def test_another_server_is_asked_anew() -> None:
    system_role, first, second = SystemRole(), Server(), Server(takes_system=False)
    assert system_role.send(PROMPT, first.send, server=first) == "system"
    assert system_role.send(PROMPT, second.send, server=second) == "user"
    assert system_role.send(PROMPT, first.send, server=first) == "system"


def test_a_refusal_of_both_forms_decides_nothing() -> None:
    system_role, server = SystemRole(), Server([400, 400, 400])
    with pytest.raises(LargeRefused):
        system_role.send(PROMPT, server.send, server=server)
    assert system_role.send(PROMPT, server.send, server=server) == "system"


def test_a_prompt_without_a_system_message_is_sent_once() -> None:
    system_role, server = SystemRole(), Server([400])
    with pytest.raises(LargeRefused):
        system_role.send(Prompt(messages=(USER,)), server.send, server=server)
    assert server.roles == ["user"]
