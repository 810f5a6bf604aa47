"""The chat loop: typed or piped messages, commands, errors and interrupts."""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mlxroute.answers.document import AnswerDocument
from mlxroute.cli.command_words import split_command
from mlxroute.cli.commands.chat import run_chat
from mlxroute.cli.line_input import CommandCompleter, LineEditor, LineReader, Reader
from mlxroute.conversation import Conversation
from mlxroute.errors import ContextTooLong, LargeTimeout, MlxRouteError, WeightsError
from mlxroute.types import Message, OnFailure, RunStats, Uploads, ignore_failure
from tests.support.scripted_answer import NO_STATS, ScriptedAnswer, Step

ENTER, NEW_LINE, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


class ScriptedRouting:
    """A threshold and a budget."""

    unit = "nats"

    def __init__(self) -> None:
        self.threshold = 2.5
        self.budget: float | None = None

    def set_threshold(self, threshold: float) -> None:
        self.threshold = threshold

    def set_budget(self, budget: float) -> None:
        self.budget = budget


class ScriptedSession:
    """Answers with the given scripts in turn, then with an echo of the last message."""

    def __init__(self, *scripts: Sequence[Step] | MlxRouteError) -> None:
        self._scripts = list(scripts)
        self.conversation = Conversation()
        self.routing = ScriptedRouting()
        self.mode = "wait"
        self.cost: float | None = None
        # What finding out about the server takes.
        self.uploads = Uploads(requests=1, size_bytes=50, tokens=8, completion_tokens=1)
        self.new_warnings: list[str] = []
        self.asked: list[list[Message]] = []
        self.changes: list[tuple[str | None, ...]] = []

    def answer(
        self, messages: Sequence[Message], *, on_failure: OnFailure = ignore_failure
    ) -> ScriptedAnswer:
        self.asked.append(list(messages))
        script = self._scripts.pop(0) if self._scripts else [f"echo {messages[-1]['content']}"]
        if isinstance(script, MlxRouteError):
            raise script
        self.uploads += Uploads(requests=1, size_bytes=99, tokens=9)
        stats = replace(NO_STATS, escalated=1, uploaded_tokens=9, uploaded_bytes=99, requests=1)
        return ScriptedAnswer(script, stats=stats)

    def save_conversation(self, path: Path) -> None:
        self.conversation.save(path)

    def change_large(self, address: str, model: str | None, err: Console) -> None:
        self.changes.append(("large", address, model))

    def change_small(self, name: str, err: Console) -> None:
        if name == "none":
            raise WeightsError("there is no model none")
        if name == "slow":
            raise KeyboardInterrupt
        self.changes.append(("small", name))

    def warnings(self, stats: RunStats) -> list[str]:
        warnings, self.new_warnings = self.new_warnings, []
        return warnings

    def describe(self) -> str:
        return "tiny, asking huge"

    @property
    def questions(self) -> list[str]:
        return [messages[-1]["content"] for messages in self.asked]


class Chat:
    """A chat with captured output."""

    def __init__(self, session: ScriptedSession, folder: Path) -> None:
        self.session = session
        self.history_path = folder / "state" / "history"
        self.out, self.err = io.StringIO(), io.StringIO()
        self.notices: list[str] = []

    def notice(self, line: str) -> None:
        self.notices.append(line)

    def run(self, reader: Reader | None) -> int:
        return run_chat(
            self.session,
            console_out=Console(file=self.out, _environ={}),
            console_err=Console(file=self.err, width=40, _environ={}),
            history_path=self.history_path,
            reader=reader,
        )

    def type(self, *keys: str) -> int:
        with typing(*keys) as pipe:
            editor = LineEditor(
                CommandCompleter({}),
                history_path=self.history_path,
                notify=self.notice,
                input=pipe,
                output=DummyOutput(),
            )
            return self.run(editor)

    def pipe(self, text: str) -> int:
        return self.run(LineReader(io.StringIO(text)))

    @property
    def printed(self) -> list[str]:
        return self.err.getvalue().splitlines()


@contextmanager
def typing(*keys: str) -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        pipe.send_bytes("".join(keys).encode(errors="surrogateescape"))
        yield pipe


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(ScriptedSession(), tmp_path)


def test_each_question_is_asked_with_the_conversation_so_far(chat: Chat) -> None:
    assert chat.type("one", ENTER, "two", ENTER, CTRL_D) == 0
    assert chat.session.asked[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "echo one"},
        {"role": "user", "content": "two"},
    ]
    assert chat.out.getvalue() == "echo one\necho two\n"
    assert "1 token, 1 escalated (100%)" in chat.err.getvalue()


def test_pasted_lines_and_alt_enter_make_one_message(chat: Chat) -> None:
    paste = "\x1b[200~first\nsecond\x1b[201~"
    chat.type(paste, NEW_LINE, "third", ENTER, CTRL_D)
    assert chat.session.questions == ["first\nsecond\nthird"]


def test_colours_in_a_paste_that_the_terminal_does_not_mark_are_left_out(chat: Chat) -> None:
    chat.type("\x1b[31mred\x1b[0m \x1b[<1m\x1b[Mabc\x1b[1;31mtoo\x1b[0m", ENTER, CTRL_D)
    assert chat.session.questions == ["red too"]


def test_a_pasted_message_that_begins_like_a_command_is_a_message(chat: Chat) -> None:
    chat.type("\x1b[200~/reset\nis what?\x1b[201~", ENTER, "/usr/bin/env?", ENTER, CTRL_D)
    chat.type(" /reset", ENTER, CTRL_D)
    assert chat.session.questions == ["/reset\nis what?", "/usr/bin/env?", " /reset"]


def test_blank_messages_are_not_asked(chat: Chat) -> None:
    chat.type(ENTER, "  ", ENTER, CTRL_D)
    assert chat.session.asked == []


def test_the_text_of_an_interrupted_answer_is_kept(tmp_path: Path) -> None:
    session = ScriptedSession(["half ", "an", KeyboardInterrupt()])
    chat = Chat(session, tmp_path)
    assert chat.type("go", ENTER, "on", ENTER, CTRL_D) == 0
    assert session.conversation.turns[:2] == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "half an"},
    ]
    assert "(stopped)" in chat.printed
    assert session.questions == ["go", "on"]


@pytest.mark.parametrize(
    "script",
    [
        [KeyboardInterrupt()],
        ContextTooLong("too long"),
        ["some text", LargeTimeout("no reply")],
    ],
)
def test_a_message_without_an_answer_is_offered_again_for_editing(
    tmp_path: Path, script: Sequence[Step] | MlxRouteError
) -> None:
    chat = Chat(ScriptedSession(script), tmp_path)
    chat.type("why", ENTER, " not?", ENTER, CTRL_D)
    assert chat.session.questions == ["why", "why not?"]
    assert len(chat.session.asked[1]) == 1


def test_an_error_is_one_line_and_the_conversation_goes_on(tmp_path: Path) -> None:
    chat = Chat(ScriptedSession(["fine"], LargeTimeout("no reply\x1b[2J in 3 s")), tmp_path)
    assert chat.type("one", ENTER, "two", ENTER, CTRL_C, CTRL_D) == 0
    assert "error: no reply[2J in 3 s" in chat.printed
    assert [turn["content"] for turn in chat.session.conversation.turns] == ["one", "fine"]


def test_ctrl_c_clears_a_line_and_on_an_empty_one_shows_how_to_leave(chat: Chat) -> None:
    assert chat.type("abandoned", CTRL_C, "/quit", ENTER) == 0
    assert "Ctrl-D or /quit leaves the chat" not in chat.printed
    assert chat.type(CTRL_C, CTRL_D) == 0
    assert "Ctrl-D or /quit leaves the chat" in chat.printed
    assert chat.session.asked == []


def test_ctrl_c_again_while_the_way_to_leave_is_shown_does_not_leave(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    print_text, interrupts = Console.print, iter([True])

    def interrupt_and_print(console: Console, text: object, *, soft_wrap: bool) -> None:
        if "leaves the chat" in str(text) and next(interrupts, False):
            raise KeyboardInterrupt
        print_text(console, text, soft_wrap=soft_wrap)

    monkeypatch.setattr(Console, "print", interrupt_and_print)
    assert chat.type(CTRL_C, "hello", ENTER, CTRL_D) == 0
    assert "Ctrl-D or /quit leaves the chat" in chat.printed
    assert chat.session.questions == ["hello"]


def test_the_history_is_kept_for_its_owner_only_and_offered_next_time(chat: Chat) -> None:
    chat.type("first question", ENTER, CTRL_D)
    assert stat.S_IMODE(chat.history_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(chat.history_path.parent.stat().st_mode) == 0o700
    chat.type("second question", ENTER, CTRL_D)
    chat.type(UP, UP, ENTER, CTRL_D)
    assert chat.session.questions[-1] == "first question"


@pytest.mark.parametrize(
    "line",
    [
        "/large http://me:s3cret@box/v1",
        "/large https://me:s3/cret@box/v1",
        "/large me:s3cret@box:8000",
        " /large https:/me:s3cret@box ID",
        "/larg me:s3cret@box",
        "why does https://me:s3/cret@box/v1 fail?",
    ],
)
def test_a_password_in_an_address_is_not_kept_in_the_history(line: str, chat: Chat) -> None:
    chat.type(line, ENTER, "me@box: hello", ENTER, CTRL_D)
    history = chat.history_path.read_text(encoding="utf-8")
    assert "me@box: hello" in history
    assert "cret" not in history


def test_the_mode_of_a_file_that_the_history_links_to_stays(chat: Chat, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.touch()
    target.chmod(0o644)
    chat.history_path.parent.mkdir()
    chat.history_path.symlink_to(target)
    chat.type("hello", ENTER, CTRL_D)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert "hello" in target.read_text(encoding="utf-8")


def test_a_history_that_cannot_be_written_is_a_note_and_the_chat_works(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a folder")
    chat = Chat(ScriptedSession(), tmp_path)
    assert chat.type("hello", ENTER, CTRL_D) == 0
    assert chat.notices[0].startswith("your messages are not kept for the next chat: cannot write")
    assert chat.session.questions == ["hello"]


def test_piped_lines_are_one_message_each(chat: Chat) -> None:
    assert chat.pipe("one\n\ntwo") == 0
    assert chat.session.questions == ["one", "two"]
    assert chat.out.getvalue() == "echo one\necho two\n"


def test_stdin_that_is_no_terminal_is_read_line_by_line(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/quit\ntwo\n"))
    assert chat.run(None) == 0
    assert chat.session.questions == ["one"]


@pytest.mark.parametrize(
    ("failure", "code"), [(ContextTooLong("too long"), 2), (LargeTimeout("no reply"), 3)]
)
def test_an_error_in_a_pipe_ends_nothing_and_is_the_exit_code(
    tmp_path: Path, failure: MlxRouteError, code: int
) -> None:
    chat = Chat(ScriptedSession(failure), tmp_path)
    assert chat.pipe("one\n/mode\ntwo\n") == code
    assert chat.session.questions == ["one", "two"]
    assert any(line.startswith(f"error: {failure}") for line in chat.printed)
    assert chat.pipe("/mode fast\nthree\n") == 2
    assert chat.session.questions[-1] == "three"


_NO_COMMANDS = (
    "/* TODO */ explain",
    "/tmp is full, why?",
    "/etc/hosts?",
    "//comment",
    "/dev/null",
    "/\\d+/g matches what?",
    "/r/python or /r/rust?",
    "/ means what?",
    "/été est beau",
)


@pytest.mark.parametrize("text", _NO_COMMANDS)
def test_text_that_begins_with_a_slash_is_a_message_unless_it_names_a_command(
    chat: Chat, text: str
) -> None:
    assert chat.type(text, ENTER, CTRL_D) == 0
    assert chat.session.questions == [text]


@pytest.mark.parametrize(
    "text", [*_NO_COMMANDS, "/helpful is a word", "/stast", "/help me", "/quit smoking how?", "/"]
)
def test_piped_text_that_is_no_command_is_answered(chat: Chat, text: str) -> None:
    assert chat.pipe(f"{text}\nnext\n") == 0
    assert chat.session.questions == [text, "next"]


def test_a_prompt_that_is_too_long_gets_the_advice_of_a_chat(tmp_path: Path) -> None:
    chat = Chat(ScriptedSession(ContextTooLong("too long")), tmp_path)
    chat.pipe("one\n")
    assert "error: too long; /reset starts a new conversation" in chat.err.getvalue().replace(
        "\n", " "
    )


def test_piped_bytes_that_are_no_text_are_one_clear_error(chat: Chat) -> None:
    # What follows the bytes may begin inside a line, so none of it is sent.
    text = b"x" * 8000 + b"\ncaf\xe9\nnext\n" + b"y" * 600 + b"\nlast\n"
    stream = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
    assert chat.run(LineReader(stream)) == 2
    assert [line for line in chat.printed if line] == ["error: stdin is not utf-8 text"]
    assert set(chat.session.questions) <= {"x" * 8000}


def test_a_piped_line_that_is_no_text_is_an_error_and_the_next_is_answered(chat: Chat) -> None:
    assert chat.pipe("hi\nbad\0x\nnext\n") == 2
    assert chat.session.questions == ["hi", "next"]
    (error,) = [line for line in chat.printed if line.startswith("error")]
    assert error.startswith("error: stdin: it has NUL characters, as UTF-16")


def test_an_interrupt_in_a_pipe_ends_it_with_the_text_so_far(tmp_path: Path) -> None:
    chat = Chat(ScriptedSession(["half", KeyboardInterrupt()]), tmp_path)
    assert chat.pipe("one\ntwo\n") == 130
    assert chat.out.getvalue() == "half\n"
    assert chat.session.questions == ["one"]


def test_a_second_interrupt_keeps_the_text_that_is_on_the_screen(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(answer: ScriptedAnswer) -> AnswerDocument:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScriptedAnswer, "document", interrupt)
    assert chat.pipe("one\ntwo\n") == 130
    messages = chat.session.conversation.messages
    assert [message["content"] for message in messages] == ["one", "echo one"]


def test_help_lists_every_command(chat: Chat) -> None:
    chat.type("/help", ENTER, CTRL_D)
    for command in ("help", "reset", "stats", "threshold", "mode", "save", "load", "quit"):
        assert any(line.startswith(f"/{command} ") for line in chat.printed)


def test_reset_forgets_the_turns_and_keeps_the_system_prompt(chat: Chat) -> None:
    chat.session.conversation.system = "Be terse."
    chat.type("one", ENTER, "/reset", ENTER, "two", ENTER, CTRL_D)
    assert [message["content"] for message in chat.session.asked[1]] == ["Be terse.", "two"]


def test_reset_after_load_begins_with_the_system_prompt_of_the_settings(
    chat: Chat, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    chat.session.conversation.save(file)
    chat.session.conversation.system = "Be terse."
    chat.type(f"/load {file}", ENTER, "one", ENTER, "/reset", ENTER, "two", ENTER, CTRL_D)
    asked = [[message["content"] for message in messages] for messages in chat.session.asked]
    assert asked == [["one"], ["Be terse.", "two"]]


def test_stats_add_up_over_the_chat(chat: Chat) -> None:
    chat.type("one", ENTER, "/reset", ENTER, "two", ENTER, "/stats", ENTER, CTRL_D)
    assert any(line.startswith("2 answers, 2 tokens, 2 escalated (100%)") for line in chat.printed)


def test_stats_count_everything_sent_in_the_chat_and_what_it_costs(chat: Chat) -> None:
    chat.type("one", ENTER, "two", ENTER, "/stats", ENTER, CTRL_D)
    assert "uploaded 26 tokens (248 bytes) in 3 requests" in chat.err.getvalue()
    assert "cost" not in chat.err.getvalue()
    chat.session.cost = 0.028
    chat.type("/stats", ENTER, CTRL_D)
    assert "cost ~0.0280" in chat.err.getvalue()


def test_a_warning_follows_the_answer_it_is_about(chat: Chat) -> None:
    chat.session.new_warnings = ["3 positions kept local by --never-send"]
    chat.type("one", ENTER, "two", ENTER, CTRL_D)
    warnings = [line for line in chat.printed if "--never-send" in line]
    assert warnings == ["warning: 3 positions kept local by --never-send"]


@pytest.mark.parametrize(
    ("value", "threshold", "expected"),
    [
        ("1.5", 1.5, "threshold 1.5 nats"),
        ("inf", math.inf, "threshold inf: the large model is never asked"),
        ("-inf", -math.inf, "threshold -inf: the large model is always asked"),
        ("", 2.5, "threshold 2.5 nats"),
        ("abc", 2.5, "error: /threshold takes a number, inf or -inf, not abc"),
        ("nan", 2.5, "error: /threshold takes a number, inf or -inf, not nan"),
    ],
)
def test_threshold_shows_and_sets(chat: Chat, value: str, threshold: float, expected: str) -> None:
    chat.type(f"/threshold {value}", ENTER, CTRL_D)
    assert chat.session.routing.threshold == threshold
    assert expected in chat.printed


@pytest.mark.parametrize(
    ("value", "mode", "expected"),
    [
        ("overlap", "overlap", "mode overlap; choices: auto, wait, overlap, hedge"),
        ("", "wait", "mode wait; choices: auto, wait, overlap, hedge"),
        ("fast", "wait", "error: unknown mode 'fast'; choose one of auto, wait, overlap, hedge"),
    ],
)
def test_mode_shows_and_sets(chat: Chat, value: str, mode: str, expected: str) -> None:
    chat.type(f"/mode {value}", ENTER, CTRL_D)
    assert chat.session.mode == mode
    assert expected in chat.printed


def test_the_threshold_of_a_budget_is_shown_as_one_that_moves(chat: Chat) -> None:
    chat.session.routing.budget = 0.07
    chat.type("/threshold", ENTER, CTRL_D)
    assert "threshold 2.5 nats now; it follows the budget" in chat.printed


@pytest.mark.parametrize(
    ("value", "budget", "expected"),
    [
        ("3%", 0.03, "budget 3%"),
        ("0.1", 0.1, "budget 10%"),
        ("", None, "no budget; a threshold is set"),
        ("much", None, "error: 'much' is not a share from 0% to 100%; write 7% or 0.07"),
    ],
)
def test_budget_shows_and_sets(chat: Chat, value: str, budget: float | None, expected: str) -> None:
    chat.type(f"/budget {value}", ENTER, CTRL_D)
    assert chat.session.routing.budget == budget
    assert expected in chat.printed


def test_a_budget_that_is_none_without_a_threshold_is_shown_as_never(chat: Chat) -> None:
    chat.session.routing.threshold = math.inf
    chat.type("/budget", ENTER, CTRL_D)
    assert "no budget; the large model is never asked" in chat.printed


def test_a_loaded_conversation_can_be_continued(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "my chat.json"
    chat.type("one", ENTER, f"/save {path}", ENTER, "/reset", ENTER, CTRL_D)
    chat.type(f"/load {path}", ENTER, "two", ENTER, CTRL_D)
    assert [message["content"] for message in chat.session.asked[1]] == ["one", "echo one", "two"]
    assert f"loaded 2 messages from {path}" in chat.printed


def test_a_bad_file_leaves_the_conversation_as_it_was(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    chat.type("one", ENTER, f"/load {tmp_path / 'bad.json'}", ENTER, "/load", ENTER, CTRL_D)
    assert len(chat.session.conversation.turns) == 2
    assert "error: /load needs a file name" in chat.printed
    assert any("bad.json is not a conversation" in line for line in chat.printed)


def test_a_long_message_that_begins_like_a_command_is_read_at_once() -> None:
    # Backtracking over the blanks would take minutes.
    assert split_command("/x" + " " * 10_000 + "y\nz") == ("", "")
    assert split_command("/X " + " " * 10_000 + "y") == ("/x", "y")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/rset", "unknown command /rset; did you mean /reset?"),
        ("/xyzzy", "unknown command /xyzzy; /help lists the commands"),
        ("/", "unknown command /; /help lists the commands"),
        ("/reset all", "/reset takes no value"),
        ("/halp me", "unknown command /halp; did you mean /help?"),
        ("/clear", "unknown command /clear; /help lists the commands"),
    ],
)
def test_a_wrong_command_is_one_line_and_asks_nothing(
    chat: Chat, command: str, expected: str
) -> None:
    chat.type(command, ENTER, CTRL_D)
    assert any(line.startswith(f"error: {expected}") for line in chat.printed)
    assert chat.session.asked == []


def test_commands_ignore_case_and_surrounding_spaces(chat: Chat) -> None:
    chat.type("/Threshold   1 ", ENTER, "/QUIT ", ENTER)
    assert chat.session.routing.threshold == 1.0


def test_undecodable_bytes_in_a_message_are_replaced(chat: Chat) -> None:
    chat.type("caf\udce9", ENTER, CTRL_D)
    assert [question.encode() for question in chat.session.questions] == [b"caf?"]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/s", ["/stats", "/save"]),
        ("/mode ", ["/mode wait", "/mode overlap"]),
        ("/mode o", ["/mode overlap"]),
        ("/stats ", []),
        ("/save fo", ["/save folder/"]),
        ("/save folder/", ["/save folder/chat.json"]),
        ("/nothing x", []),
        ("what /s", []),
    ],
)
def test_commands_modes_and_paths_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, completed: list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "chat.json").touch()
    monkeypatch.chdir(tmp_path)
    completer = CommandCompleter(
        {"/stats": tuple, "/save": None, "/mode": lambda: ("wait", "overlap")}
    )
    completions = completer.get_completions(Document(typed), CompleteEvent())
    assert [
        typed[: len(typed) + completion.start_position] + completion.text
        for completion in completions
    ] == completed


def test_why_lists_the_escalations_of_the_last_answer(chat: Chat) -> None:
    chat.type("one", ENTER, "/why", ENTER, CTRL_D)
    assert "token 3, after a" in chat.printed
    assert '  small  "c" 90%' in chat.printed
    assert '  large  "d" 61%' in chat.printed
    # In a file or pipe, lines stay whole.
    assert max(map(len, chat.printed)) > 40


def test_why_without_an_answer_is_an_error(chat: Chat) -> None:
    chat.type("/why", ENTER, CTRL_D)
    assert "error: there is no answer yet" in " ".join(chat.err.getvalue().split())


def test_save_and_load_keep_the_escalations(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat.type("one", ENTER, f"/save {file}", ENTER, "/reset", ENTER, f"/load {file}", ENTER, CTRL_D)
    (answer,) = Conversation.load(file).answers
    assert answer is not None
    assert len(answer.escalated_tokens) == 1
    assert chat.session.conversation.last_answer == answer


def test_models_change_in_mid_chat(chat: Chat) -> None:
    commands = ("/large http://box/v1 big", "/large http://box", "/small other", "/small", "/large")
    assert (
        chat.type("one", ENTER, *(key for line in commands for key in (line, ENTER)), CTRL_D) == 0
    )
    assert chat.session.changes == [
        ("large", "http://box/v1", "big"),
        ("large", "http://box", None),
        ("small", "other"),
    ]
    assert chat.printed.count("tiny, asking huge") == 5
    assert len(chat.session.conversation.turns) == 2


def test_an_interrupted_command_says_that_nothing_has_changed(chat: Chat) -> None:
    assert chat.type("/small slow", ENTER, "one", ENTER, CTRL_D) == 0
    assert "(stopped; nothing has changed)" in chat.printed
    assert "Ctrl-D or /quit leaves the chat" not in chat.printed
    assert chat.session.questions == ["one"]


def test_an_interrupted_command_in_a_pipe_ends_it(chat: Chat) -> None:
    assert chat.pipe("/small slow\none\n") == 130
    assert chat.session.questions == []


def test_a_model_that_cannot_be_loaded_leaves_the_chat_running(chat: Chat) -> None:
    assert chat.type("/small none", ENTER, "one", ENTER, CTRL_D) == 0
    assert "error: there is no model none" in chat.printed
    assert chat.session.questions == ["one"]
