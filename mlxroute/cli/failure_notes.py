"""Notes on failures of the large model during an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.error_advice import error_message
from mlxroute.cli.terminal import WARNING_STYLE, print_note
from mlxroute.errors import LargeError
from mlxroute.safe_text import printable
from mlxroute.types import CallFailure

if TYPE_CHECKING:
    from rich.console import Console


class FailureNotes:
    """Prints the first failure of each kind on stderr.

    While an answer is drawn on the terminal that stderr is too, notes wait for `flush`.
    """

    def __init__(self, out: Console, err: Console) -> None:
        self._err = err
        self._is_held = out.is_terminal and err.is_terminal
        self._held: list[str] = []

    def __call__(self, failure: CallFailure) -> None:
        """Print or hold a note."""
        self._held.append(failure_note(failure))
        if not self._is_held:
            self.flush()

    def flush(self) -> None:
        """Print the notes that are held."""
        held, self._held = self._held, []
        for line in held:
            print_note(self._err, f"warning: {line}", style=WARNING_STYLE)


def failure_note(failure: CallFailure) -> str:
    """Return one printable line that says why a position stayed unchecked."""
    error = LargeError(failure.reason, parameter=failure.parameter)
    return printable(" ".join(error_message(error).split()))
