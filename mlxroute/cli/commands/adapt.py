"""`adapt`: tune the small model to the large one's answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute._version import __version__
from mlxroute.cli.adapt_notes import print_figures, warn_of_answers, warn_of_known
from mlxroute.cli.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from mlxroute.cli.flags import AtOnce, Examples, QuestionFiles, Shots
from mlxroute.cli.folders import (
    data_name,
    expand_optional,
    hash_file,
    locked_folder,
    output_folder,
)
from mlxroute.cli.model_pair import load_paired_small, note_recorded, open_recording
from mlxroute.cli.worked_examples import (
    DEFAULT_SHOTS,
    check_questions_fit,
    check_questions_sendable,
    note_sentences,
    read_examples,
    trained_questions,
)
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.user_folders import expand_user

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.large import LargeModel
    from mlxroute.questions.question_files import Question
    from mlxroute.recorded.recording_large import RecordingLarge
    from mlxroute.small import SmallModel
    from mlxroute.training.tuning_types import (
        InterruptedRun,
        TuningOptions,
        TuningOutcome,
        WorkedAnswer,
    )
    from mlxroute.types import Progress

_RANK = 16
_RECORDING = "large model's answers"


def adapt(
    settings: Settings,
    data: QuestionFiles,
    out: Annotated[
        Path, typer.Option(help="New folder for the adapter, for --adapter.", metavar="DIR")
    ],
    questions: Annotated[
        int, typer.Option(help="Maximum number of questions per file, sampled at random.", min=1)
    ] = 500,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    examples: Examples = None,
    shots: Shots = None,
    at_once: AtOnce = 4,
    epochs: Annotated[
        int, typer.Option(help="Maximum number of passes over the answers.", min=1)
    ] = 2,
    rounds: Annotated[
        int,
        typer.Option(
            help="On-policy rounds: the large model corrects the small one's own answers.", min=0
        ),
    ] = 0,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA weights. Default: 16, or that of --adapter.", min=1, max=256
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Highest step size of the optimiser.", metavar="X")
    ] = 1e-5,
) -> int:
    """Tune the small model (LoRA) to the large model's answers.

    Answers are recorded, so that none is asked for twice; Ctrl-C keeps the best weights so far.
    """
    from mlxroute.cli.large_setup import require_large
    from mlxroute.cli.terminal import make_consoles
    from mlxroute.questions.question_files import MIN_TRAINING_QUESTIONS, sample_files

    address = require_large(settings, "adapt")
    out = output_folder(out)
    _check_options(settings, rank, learning_rate)
    sampled = sample_files(data, questions, at_least=MIN_TRAINING_QUESTIONS)
    worked = read_examples(examples, shots, sampled)
    run = _AdaptRun(
        questions=sampled,
        examples=worked,
        data_report=_report_data(settings, data, sampled, worked),
        tokens=tokens,
        at_once=at_once,
        epochs=epochs,
        rounds=rounds,
        rank=rank or _RANK,
        learning_rate=learning_rate,
        command=shlex.join(
            [
                *("mlxroute", "adapt", *_model_words(settings, address), "--out", str(out)),
                *(word for file in data for word in ("--data", str(file))),
                *("--questions", str(questions), "--tokens", str(tokens), "--shots", _shots(shots)),
                *(("--examples", str(examples)) if examples else ()),
                *("--epochs", str(epochs), "--rounds", str(rounds), "--rank", str(rank or _RANK)),
                *("--learning-rate", f"{learning_rate:g}"),
            ]
        ),
    )
    check_questions_sendable(settings, run.questions, run.examples, "adapt")
    _, err = make_consoles()
    note_sentences(run.questions, err)
    with locked_folder(out):
        outcome = _adapt_in(out, run, settings, address, err)
    print_figures(outcome, out, err)
    shown = {name: value for name, value in outcome.report.items() if name != "questions"}
    sys.stdout.write(json.dumps(shown) + "\n")
    return EXIT_INTERRUPTED if outcome.ended_by == "interrupt" else EXIT_OK


def _adapt_in(
    out: Path, run: _AdaptRun, settings: Settings, address: str, err: Console
) -> TuningOutcome:
    """Begin a run in a folder, or resume the one that was interrupted there."""
    from mlxroute.cli.large_setup import make_large, open_ledger
    from mlxroute.cli.terminal import print_note

    if (interrupted := _find_interrupted(out, run.command, run.data_report)) is not None:
        print_note(err, f"resuming {interrupted.place}")
    with open_ledger(settings) as ledger, make_large(settings, address, ledger, err) as large:
        try:
            return run.adapt(settings, large, out, interrupted, err)
        except KeyboardInterrupt:
            if interrupted is None:
                print_note(err, "no adapter was written yet; the recorded answers are kept")
            raise


def _check_options(settings: Settings, rank: int | None, learning_rate: float) -> None:
    if not 0 < learning_rate < 1:
        raise UsageError("--learning-rate must be between 0 and 1")
    if settings.adapter is None:
        return
    if rank is not None:
        raise UsageError("--rank cannot be given with an adapter to start from: its rank stays")
    from mlxroute.backend.adapter_folder import adapted_name, read_adapter_config

    # Both raise for one that cannot be trained further, before its answers are asked for.
    adapted_name("", expand_user(settings.adapter))
    read_adapter_config(expand_user(settings.adapter))


def _shots(count: int | None) -> str:
    return str(DEFAULT_SHOTS if count is None else count)


def _model_words(settings: Settings, address: str) -> list[str]:
    """Return the flags that name the models, without the user and password of the address."""
    from mlxroute.cli.small_setup import default_small
    from mlxroute.large.http.address import parse_address

    words = ["--small", settings.small or default_small(), "--large", parse_address(address).url]
    if settings.large_model is not None:
        words += ["--large-model", settings.large_model]
    return words if settings.adapter is None else [*words, "--adapter", settings.adapter]


def _find_interrupted(out: Path, command: str, data: dict[str, Any]) -> InterruptedRun | None:
    """Return the interrupted run of this command that the folder holds; None for a new folder.

    `data` is the part of a report about the data. Raises UsageError for a folder with other files,
    and for a run with other data: what it held out may have become training data, or the reverse.
    """
    from mlxroute.backend.adapter_folder import PROVENANCE_FILE, holds_no_adapter
    from mlxroute.backend.model_files import read_json_object

    if holds_no_adapter(out):
        return None
    file = out / PROVENANCE_FILE
    if file.is_file():
        report = read_json_object(file)
        if report.get("command") == command:
            from mlxroute.training.tuning_types import InterruptedRun

            try:
                interrupted = InterruptedRun.from_report(report)
            except ValueError as exc:
                raise UsageError(f"{file}: {exc}; choose a new folder") from exc
            if interrupted is not None:
                if any(report.get(name) != value for name, value in data.items()):
                    raise UsageError(
                        f"--out {out}: the data or the worked examples have changed since this run"
                        " was interrupted, or an earlier version began it; restore them, or choose"
                        " a new folder"
                    )
                return interrupted
    raise UsageError(
        f"--out {out}: choose a new folder for the adapter; this one has files, and no interrupted"
        " run of this command"
    )


def _report_data(
    settings: Settings, files: list[Path], questions: list[Question], examples: list[Question]
) -> dict[str, Any]:
    """Return files, worked examples and questions, those of the adapter to start from too."""
    from mlxroute.questions.question_files import hash_examples
    from mlxroute.training.tuning_types import MAX_EVERY_FIFTH

    names = {question.fingerprint for question in questions}
    # Earlier versions held out the first ones: such a run must not go on with others.
    spread = {"held_out_from": "all questions"} if len(questions) > MAX_EVERY_FIFTH else {}
    # They also judged by answers that were cut off.
    lacks_answers = any(question.answer is None for question in questions)
    outcomes = {"outcomes_of": "answers that end"} if lacks_answers else {}
    return {
        **spread,
        **outcomes,
        # A pipe has no fingerprint.
        "data": [
            {"name": data_name(file), "sha256": hash_file(file) if file.is_file() else None}
            for file in files
        ],
        "examples_sha256": hash_examples(examples),
        "questions": sorted(names | trained_questions(settings)),
    }


def _hash_name(large: LargeModel) -> str:
    """Return the SHA-256 of the large model's name in records, which may be a path."""
    from mlxroute.recorded.recording_large import recorded_name

    return hashlib.sha256(recorded_name(large).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _AdaptRun:
    """The options of one run.

    Args:
        questions: Questions that the large model answers.
        examples: Worked examples before each question.
        data_report: What the provenance says of the data, as they were when they were read.
        tokens: Maximum length of an answer.
        at_once: Maximum number of calls in flight.
        epochs: Maximum number of times that each answer is trained on.
        rounds: Number of on-policy rounds.
        rank: Rank of the LoRA weights.
        learning_rate: Step size of the optimiser.
        command: The command line of this run.
    """

    questions: list[Question]
    examples: list[Question]
    data_report: dict[str, Any]
    tokens: int
    at_once: int
    epochs: int
    rounds: int
    rank: int
    learning_rate: float
    command: str

    def adapt(
        self,
        settings: Settings,
        large: LargeModel,
        out: Path,
        interrupted: InterruptedRun | None,
        err: Console,
    ) -> TuningOutcome:
        """Record the large model's answers, and train the small model on them."""
        from mlxroute.cli.progress import count_progress

        start = settings if interrupted is None else replace(settings, adapter=str(out))
        small = load_paired_small(start, large, err)
        if interrupted is not None and interrupted.small_files != small.fingerprint:
            raise UsageError(
                f"--out {out}: the files of {small.plain_name} have changed since this run was"
                " interrupted; restore them, or choose a new folder"
            )
        if interrupted is not None and interrupted.large_record != _hash_name(large):
            raise UsageError(
                f"--out {out}: this run was begun with another large model or server than"
                f" {large.model_name} on {large.base_url}; use the earlier one, or choose a new"
                " folder"
            )
        check_questions_fit(small, self.questions, self.examples)
        from mlxroute.training.adaptation import adapt_to_answers, split_answers
        from mlxroute.training.on_policy import Corrector

        with (
            open_recording(settings, small, large, at_once=self.at_once) as recording,
            count_progress(err) as counts,
        ):
            answers = self._record(settings, small, recording, counts, err)
            warn_of_answers(answers, small.vocabulary, self.tokens, err)
            # Those of the adapter to start from, not of an interrupted run.
            known = trained_questions(settings)
            trained, held_out = split_answers(small, answers, known=known)
            warn_of_known(held_out, known, err)
            return adapt_to_answers(
                small,
                trained,
                held_out,
                self._tuning_options(start, interrupted),
                folder=out,
                provenance=self._provenance(settings, small, large),
                corrector=Corrector(recording, self.at_once) if self.rounds else None,
                progress=counts,
            )

    def _record(
        self,
        settings: Settings,
        small: SmallModel,
        recording: RecordingLarge,
        progress: Progress,
        err: Console,
    ) -> list[WorkedAnswer]:
        """Return the large model's answers to the questions, recorded before or now."""
        from mlxroute.questions.question_files import question_messages
        from mlxroute.recorded.large_answers import write_large_answers
        from mlxroute.training.tuning_types import WorkedAnswer

        conversations = [question_messages(item, self.examples) for item in self.questions]
        note_recorded(settings, small, recording, conversations, err, max_tokens=self.tokens)
        done = itertools.count()
        progress(_RECORDING, next(done), len(conversations))
        answers = write_large_answers(
            small,
            recording,
            conversations,
            max_tokens=self.tokens,
            at_once=self.at_once,
            on_answer=lambda: progress(_RECORDING, next(done), len(conversations)),
        )
        return list(map(WorkedAnswer, self.questions, conversations, answers))

    def _tuning_options(
        self, settings: Settings, interrupted: InterruptedRun | None
    ) -> TuningOptions:
        from mlxroute.training.lora_tuning import LoraShape
        from mlxroute.training.tuning_types import TuningOptions

        return TuningOptions(
            shape=LoraShape(rank=self.rank),
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            max_tokens=self.tokens,
            rounds=self.rounds,
            start=expand_optional(settings.adapter),
            interrupted=interrupted,
            skip_memory_check=settings.skip_memory_check,
        )

    def _provenance(
        self, settings: Settings, small: SmallModel, large: LargeModel
    ) -> dict[str, Any]:
        from mlxroute.backend.adapter_folder import adapted_name

        start = expand_optional(settings.adapter)
        return {
            "mlxroute": __version__,
            "small": small.plain_name,
            "small_files": small.fingerprint,
            "started_from": adapted_name(small.plain_name, start) if start else None,
            "large": large.model_name,
            "large_record": _hash_name(large),
            "examples": len(self.examples),
            "command": self.command,
            "rank": self.rank if start is None else None,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "rounds": self.rounds,
            "tokens": self.tokens,
            **self.data_report,
        }
