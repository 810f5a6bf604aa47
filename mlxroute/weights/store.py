"""The cache on disk: finished models, staging areas, manifests, locks, free space.

<cache>/models/<key>/    one finished model with its manifest; appears by rename only
<cache>/staging/<key>/   a download or conversion under way, kept so that it can resume
<cache>/locks/<key>      held while one process fetches that model
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxroute.errors import CorruptWeights, NotEnoughSpace, WeightsError
from mlxroute.types import Notify, Progress

MANIFEST = "mlxroute-manifest.json"
MANIFEST_VERSION = 1
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a cached file was when it was stored."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cached model consists of. `source` is for people, `fingerprint` tells versions of a
    local source apart (empty for fetched models)."""

    name: str
    source: str
    fingerprint: str
    files: Mapping[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Disk space of all files."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True, slots=True)
class Store:
    """The model cache under one folder."""

    root: Path

    def model_dir(self, key: str) -> Path:
        """Where a finished model lies."""
        return self.root / "models" / key

    def staging_dir(self, key: str) -> Path:
        """Where a model is put together; made on demand."""
        folder = self.root / "staging" / key
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self) -> tuple[str, ...]:
        """Keys of the finished models."""
        return tuple(sorted(path.parent.name for path in self.root.glob(f"models/*/{MANIFEST}")))

    def manifest(self, key: str, *, name: str) -> Manifest | None:
        """The manifest of a finished model, None if there is none; `name` is for error texts."""
        file = self.model_dir(key) / MANIFEST
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            if table["version"] != MANIFEST_VERSION:
                return None
            files = {path: FileRecord(**entry) for path, entry in table["files"].items()}
            return Manifest(table["name"], table["source"], table["fingerprint"], files)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise _damaged(MANIFEST, name, "it cannot be read") from exc

    def check(self, key: str, manifest: Manifest) -> None:
        """Compare sizes and times; hash a file whose time changed. Raises CorruptWeights."""
        touched = {}
        for file, record in manifest.files.items():
            path = self.model_dir(key) / file
            stat = _stat(path, file, manifest, record)
            if stat.st_mtime_ns != record.mtime_ns:
                if sha256_of(path) != record.sha256:
                    raise _damaged(file, manifest.name, "its content has changed")
                touched[file] = FileRecord(record.size, record.sha256, stat.st_mtime_ns)
        # A copied cache has new times; remember them, or every start would hash everything again.
        if touched and os.access(self.model_dir(key), os.W_OK):
            files = {**manifest.files, **touched}
            write_manifest(
                self.model_dir(key),
                Manifest(manifest.name, manifest.source, manifest.fingerprint, files),
            )

    def verify(self, key: str, manifest: Manifest, *, progress: Progress) -> None:
        """Hash every file. Raises CorruptWeights."""
        done = 0

        def count(bytes_read: int) -> None:
            nonlocal done
            done += bytes_read
            progress(f"verifying {manifest.name}", done, manifest.size_bytes)

        for file, record in manifest.files.items():
            path = self.model_dir(key) / file
            _stat(path, file, manifest, record)
            if sha256_of(path, on_bytes=count) != record.sha256:
                raise _damaged(file, manifest.name, "its content has changed")

    def commit(self, key: str, staged: Path, manifest: Manifest) -> Path:
        """Make a staged model a finished one, in one rename, and clear its staging area."""
        target = self.model_dir(key)
        with disk_errors(self.root):
            write_manifest(staged, manifest)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.discard(key)
            staged.rename(target)
            shutil.rmtree(self.staging_dir(key), ignore_errors=True)
        return target

    def discard(self, key: str) -> None:
        """Remove a finished model: out of sight in one rename, then deleted."""
        target = self.model_dir(key)
        if target.exists():
            doomed = self.staging_dir(key) / "discarded"
            with disk_errors(self.root):
                shutil.rmtree(doomed, ignore_errors=True)
                target.rename(doomed)
                shutil.rmtree(doomed)

    @contextmanager
    def lock(self, key: str, *, notify: Notify) -> Iterator[None]:
        """Hold the right to build `key`; waits, and says so, while another process has it."""
        folder = self.root / "locks"
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            handle = open(folder / key, "wb")  # noqa: SIM115
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notify(f"waiting for another mlxroute that is fetching {key}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a model's folder, whole or not at all."""
    files = {name: asdict(record) for name, record in sorted(manifest.files.items())}
    table = {
        "version": MANIFEST_VERSION,
        "name": manifest.name,
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
        "files": files,
    }
    draft = folder / f"{MANIFEST}.tmp"
    draft.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / MANIFEST)


def record(path: Path, *, sha256: str | None = None) -> FileRecord:
    """The record of a file; hashes it unless the digest is known."""
    stat = path.stat()
    return FileRecord(stat.st_size, sha256 or sha256_of(path), stat.st_mtime_ns)


def sha256_of(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as hex; `on_bytes` gets increments."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def require_space(folder: Path, needed: int, *, purpose: str) -> None:
    """Raise NotEnoughSpace unless `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotEnoughSpace(
            f"{purpose} needs {megabytes(needed)} of disk space in {folder}, but only "
            f"{megabytes(free)} is free: free some, or choose another folder with --cache-dir"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's file errors into ours, naming the cache folder."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughSpace(
                f"the disk of {folder} is full: free some space, or choose another folder "
                "with --cache-dir"
            ) from exc
        raise WeightsError(
            f"cannot write to the cache folder {folder}: {exc.strerror or exc}; "
            "choose another one with --cache-dir"
        ) from exc


def megabytes(count: int) -> str:
    """A byte count for people: `4.6 GB`, `92 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _stat(path: Path, file: str, manifest: Manifest, wanted: FileRecord) -> os.stat_result:
    try:
        stat = path.stat()
    except OSError as exc:
        raise _damaged(file, manifest.name, "it is missing") from exc
    if stat.st_size != wanted.size:
        raise _damaged(file, manifest.name, f"{stat.st_size} bytes instead of {wanted.size}")
    return stat


def _damaged(file: str, name: str, what: str) -> CorruptWeights:
    return CorruptWeights(
        f"cached file {file} of {name} is damaged ({what}): "
        f"run `mlxroute pull {name}` to fetch it again"
    )
