"""Both models of a command that records the large one's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of, record_path
from mlxroute.config import read_never_send

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mlxroute.config import Settings
    from mlxroute.large import LargeModel
    from mlxroute.recorded.recording_large import RecordingLarge
    from mlxroute.small import SmallModel
    from mlxroute.types import Message


def load_paired_small(settings: Settings, large: LargeModel, err: Console) -> SmallModel:
    """Connect to the large model; load the small one and pair its vocabulary with the large one's.

    Modules that import MLX may be imported only afterwards: loading opens the faster BLAS, which
    must come before MLX.
    """
    from mlxroute.cli.large_setup import model_notes
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.small_setup import load_small, small_name

    # Refuses an adapter that cannot be read before the large model is asked.
    small_name(settings)
    with model_notes(large, err):
        large.connect(thorough=False)
    with ByteProgress(err) as progress:
        small = load_small(settings, progress)
    large.pair_vocabulary(small.vocabulary)
    return small


def open_recording(
    settings: Settings, small: SmallModel, large: LargeModel, *, at_once: int
) -> RecordingLarge:
    """Return the large model with its recorded replies; at most `at_once` calls are in flight."""
    from mlxroute.recorded.recording_large import RECORDING_TIMEOUT_S, RecordingLarge, recorded_name

    record = record_path(settings, "replies", small.plain_name, recorded_name(large))
    return RecordingLarge(
        large,
        record,
        at_once=at_once,
        never_send=read_never_send(settings),
        timeout_s=max(RECORDING_TIMEOUT_S, settings.timeout),
    )


def note_recorded(
    settings: Settings,
    small: SmallModel,
    recording: RecordingLarge,
    conversations: Sequence[Sequence[Message]],
    err: Console,
    *,
    max_tokens: int,
) -> None:
    """Print a note if answers to conversations, or their first tokens, were recorded before.

    A large model that changed under the same name is not noticed otherwise.
    """
    from mlxroute.cli.terminal import print_note

    count = sum(
        recording.replies.find_whole(item, max_tokens) is not None
        or bool(recording.replies.find_tokens(small.encode_conversation(item).ids, 1))
        for item in conversations
    )
    if count:
        labels = cache_dir_of(settings) / "labels"
        others = (
            f", and the folder {labels} with the labels of all pairs" if labels.exists() else ""
        )
        print_note(
            err,
            f"{count} of {len(conversations)} answers were recorded before. If the large model"
            f" changed under the same name, delete {recording.replies.path}{others}",
        )


def warn_of_cut_off(is_cut_off: Sequence[bool], tokens: int, effect: str, err: Console) -> None:
    """Print a warning if more than 5 % of the large model's answers are cut off at `tokens`.

    `effect` says what follows from that, as the end of a clause about them.
    """
    from mlxroute.cli.quality_tables import MAX_CUT_OFF_SHARE
    from mlxroute.cli.terminal import WARNING_STYLE, print_note

    if sum(is_cut_off) > MAX_CUT_OFF_SHARE * len(is_cut_off):
        print_note(
            err,
            f"warning: {sum(is_cut_off)} of {len(is_cut_off)} answers of the large model were cut"
            f" off at {tokens} tokens, {effect}; raise --tokens",
            style=WARNING_STYLE,
        )
