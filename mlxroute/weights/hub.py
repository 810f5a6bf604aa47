"""The Hugging Face hub as a source of model directories, through the hub's own client."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

from huggingface_hub import constants, hf_hub_download

# The base error of whichever HTTP library the installed client is built on.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HTTPError,
    XetDownloadError,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from mlxroute.errors import CorruptWeights, WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.types import Notify, Progress, no_notice
from mlxroute.untrusted_text import TextFile, parse_json
from mlxroute.weights.byte_counter import ByteCounter, git_id_of, sha256_of
from mlxroute.weights.daemon_tasks import DaemonTasks
from mlxroute.weights.hub_listing import (
    REFUSALS,
    failure_text,
    fetch_listing,
    gate_reason,
    http_status,
    unreachable,
)
from mlxroute.weights.request import (
    PARALLEL_DOWNLOADS,
    STALL_TIMEOUT_S,
    CheckSize,
    WeightsSize,
    accept_any_size,
)
from mlxroute.weights.store import disk_errors, require_space

_POLL_S = 0.2
# The client reports bytes once per chunk; on a slow line its 10 MiB look like a stalled download.
_CHUNK_BYTES = 256 << 10
_MAX_JSON_BYTES = 64 << 20

_DTYPES = ("dtype", "torch_dtype")
# Methods whose configurations do not say how many bits a weight has.
_METHOD_BITS = {"fp8": 8, "mxfp8": 8, "mxfp4": 4}

# Top-level files that mlx_lm reads. Python files are never fetched.
_MODEL_FILES = (
    "*.json",
    "*.jsonl",
    "model*.safetensors",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded repository: its commit, and the verified SHA-256 of each large file by name."""

    revision: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _ListedFile:
    """A file in the hub's listing: large files have a `sha256`, small ones a git `blob_id`."""

    size: int
    sha256: str | None
    blob_id: str | None


def fetch_snapshot(
    hub_id: str,
    folder: Path,
    *,
    progress: Progress,
    notify: Notify = no_notice,
    check_size: CheckSize = accept_any_size,
) -> Snapshot:
    """Download a model repository and verify every file. Keeps complete files of an earlier run.

    Args:
        hub_id: The repository, `org/name`.
        folder: Where its files are written.
        progress: Receives the bytes so far; called from several threads, one at a time.
        notify: Receives a line if the hub refuses the user's token. Ignored by default.
        check_size: Raises NotEnoughSpace for weights that do not fit in memory. Accepts all by
            default.

    Raises:
        SourceUnreachable: The hub does not answer within five seconds, lacks the model, or lists no
            hash of a file.
        CorruptWeights: A file differs from the hub's listing.
        WeightsError: The repository has no MLX weights, or the download fails or stalls.
    """
    info, token = fetch_listing(hub_id, notify=notify)
    files = {
        entry.rfilename: _ListedFile(
            entry.size or 0,
            entry.lfs.sha256 if entry.lfs else None,
            # That of a large file is of a pointer to it.
            None if entry.lfs else entry.blob_id,
        )
        for entry in info.siblings or ()
        if "/" not in entry.rfilename
        and any(fnmatch(entry.rfilename, glob) for glob in _MODEL_FILES)
    }
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise WeightsError(f"{hub_id} on the hub has no config.json with model*.safetensors")
    for name, file in files.items():
        if file.sha256 is None and file.blob_id is None:
            raise unreachable(f"it lists no hash to verify {printable_line(name)} of {hub_id} with")
    with disk_errors(folder):
        # The client does not resume files of an earlier run; they only take up space.
        for unfinished in folder.rglob("*.incomplete"):
            unfinished.unlink()
        # An earlier run may have fetched another revision, and `mlx_lm` loads all weights it finds.
        for path in folder.iterdir():
            if path.is_file() and path.name not in files:
                path.unlink()
        missing_bytes = sum(
            file.size for name, file in files.items() if not (folder / name).exists()
        )
        require_space(folder, missing_bytes, purpose=f"downloading {hub_id}")
        download = _Download(hub_id, str(info.sha), files, folder, token, progress)
        download.fetch(["config.json"])
        stored = sum(file.size for name, file in files.items() if name.endswith(".safetensors"))
        widening = _widening(folder / "config.json")
        check_size(WeightsSize(hub_id, stored, int(stored * widening)))
        download.fetch(sorted(files.keys() - {"config.json"}))
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    hashes = {name: file.sha256 for name, file in files.items() if file.sha256 is not None}
    return Snapshot(str(info.sha), hashes)


def _widening(config_file: Path) -> float:
    """Return how many times as large the weights are as float32, by their config.json; at least 1.

    A file that cannot be read is refused when the model is loaded.
    """
    try:
        text = TextFile(config_file, "the model's file", _MAX_JSON_BYTES, WeightsError)
        config = parse_json(text.read(), strict=False)
        quantization = config.get("quantization") or config.get("quantization_config")
        if quantization and quantization.get("quant_method") in _METHOD_BITS:
            return 32 / _METHOD_BITS[quantization["quant_method"]]
        if quantization:
            scale_bits = 32 / int(quantization.get("group_size") or 64)
            return max(1.0, 32 / (int(quantization["bits"]) + scale_bits))
        part = config.get("text_config") or {}
        dtype = next((t[key] for t in (config, part) for key in _DTYPES if t.get(key)), None)
    except (WeightsError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return 1.0
    return 2.0 if dtype in ("float16", "bfloat16") else 1.0


class _Stopped(Exception):
    """Ends a download that nobody waits for any more."""


class _Download:
    """Downloads files of one repository and verifies them; those of an earlier run are kept.

    Args:
        hub_id: The repository.
        revision: Its commit.
        files: The hub's listing of its files.
        folder: Where they are written.
        token: The user's token, None for the client's own choice, False for none.
        progress: Receives the bytes so far.
    """

    def __init__(
        self,
        hub_id: str,
        revision: str,
        files: Mapping[str, _ListedFile],
        folder: Path,
        token: bool | None,
        progress: Progress,
    ) -> None:
        self._hub_id = hub_id
        self._revision = revision
        self._files = files
        self._folder = folder
        self._token = token
        self._activity_s = time.monotonic()
        self._is_stopped = False
        constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
        total = sum(file.size for file in files.values())
        self._counter = ByteCounter(f"downloading {hub_id}", total=total, progress=progress)
        self._bar_class = _progress_bar_class(self._counter.add, self._note_activity)

    def fetch(self, names: Sequence[str]) -> None:
        """Download files; raise WeightsError if the download fails, or no byte comes for long."""
        self._note_activity()
        tasks = [partial(self._fetch_file, name) for name in names]
        try:
            # Daemon threads: Ctrl-C and a stalled transfer must not wait for downloads to end.
            with DaemonTasks(tasks, threads=PARALLEL_DOWNLOADS) as downloads:
                self._wait_for_all(downloads, len(names))
        except (HTTPError, OSError, RuntimeError, XetDownloadError) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise
            # The client hides some refusals behind an error of its own.
            refusal = exc if http_status(exc) is not None else exc.__cause__
            if http_status(refusal) in REFUSALS:
                raise self._refused(refusal) from exc
            # Not SourceUnreachable: the next run resumes here, and no other source is tried.
            raise WeightsError(
                f"the download of {self._hub_id} was interrupted ({failure_text(exc)}): run the"
                " same command again"
            ) from exc

    def _wait_for_all(self, downloads: DaemonTasks[None], count: int) -> None:
        try:
            for _ in range(count):
                self._wait_for_next(downloads)
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        """End running downloads: over HTTP at their next byte, of Xet as the client's Ctrl-C does.

        An error raised in Xet's reports of progress would not end its download.
        """
        # Before the abort, after which a thread could begin the next file in a new session.
        self._is_stopped = True
        with contextlib.suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()  # type: ignore[no-untyped-call]

    def _wait_for_next(self, downloads: DaemonTasks[None]) -> None:
        while True:
            try:
                downloads.next_result(_POLL_S)
                return
            except Empty:
                if time.monotonic() - self._activity_s > STALL_TIMEOUT_S:
                    raise self._stalled() from None

    def _refused(self, exc: BaseException | None) -> WeightsError:
        if isinstance(exc, GatedRepoError):
            return WeightsError(f"hub: {gate_reason(self._hub_id)}")
        return WeightsError(
            f"hub: it lists {self._hub_id}, but refuses its files (status {http_status(exc)});"
            " check HF_TOKEN, and whether you may read this repository"
        )

    def _stalled(self) -> WeightsError:
        hint = "" if constants.HF_HUB_DISABLE_XET else ", or with HF_HUB_DISABLE_XET=1"
        return WeightsError(
            f"the download of {self._hub_id} stalled: no data for {STALL_TIMEOUT_S:.0f} s; run the"
            f" same command again{hint}"
        )

    def _fetch_file(self, name: str) -> None:
        self._note_activity()
        if (self._folder / name).exists():
            self._counter.add(self._files[name].size)
        hf_hub_download(
            self._hub_id,
            name,
            revision=self._revision,
            local_dir=self._folder,
            tqdm_class=self._bar_class,
            token=self._token,
        )
        self._note_activity()
        _verify(self._folder / name, self._files[name], self._hub_id, self._note_activity)
        self._note_activity()

    def _note_activity(self, count: float = 0) -> None:
        if self._is_stopped:
            raise _Stopped
        self._activity_s = time.monotonic()


def _verify(path: Path, listed: _ListedFile, hub_id: str, on_bytes: Callable[[int], None]) -> None:
    """Compare a file's hash with the listed one; delete the file and raise if they differ."""
    if listed.sha256 is not None:
        intact = sha256_of(path, on_bytes=on_bytes) == listed.sha256
    else:
        intact = git_id_of(path, on_bytes=on_bytes) == listed.blob_id
    if not intact:
        path.unlink()
        raise CorruptWeights(
            f"{path.name} of {hub_id} is not the file the hub lists (its hash differs), so it was "
            "deleted: run the same command again"
        )


def _progress_bar_class(
    count: Callable[[int], None], note_activity: Callable[[float], None]
) -> type[Any]:
    """Return a progress bar class for the client that draws nothing and counts bytes."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if n:
                note_activity(n)
            count(int(n or 0))

        # If these exist, the client reports network bytes to them and not twice to `update`.
        def update_transfer(self, n: float) -> None:
            if n:
                note_activity(n)

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None: ...

    # tqdm's own lock works across processes, and a Mac starts a process to watch over it.
    Bar.set_lock(threading.RLock())
    return Bar
