"""The model cache on disk: finished models, staging folders, manifests and locks.

<cache>/models/<key>/    a finished model with its manifest; created by renaming a staging folder
<cache>/staging/<key>/   an unfinished download or conversion, kept so that it can be resumed;
                         without file locks, <key>.<machine>.<process id>-<number> while a process
                         has it, and <key>.left afterwards
<cache>/locks/<key>      locked while a process fetches that model
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mlxroute.errors import CorruptWeights, NotEnoughSpace, WeightsError
from mlxroute.replace_file import lock_file, replace_file
from mlxroute.types import Notify, Progress
from mlxroute.untrusted_text import TextFile, parse_json
from mlxroute.weights.byte_counter import ByteCounter, sha256_of

MANIFEST = "mlxroute-manifest.json"
MANIFEST_VERSION = 1
_MAX_MANIFEST_BYTES = 16 << 20
# Begins the name of a folder that is being deleted, in `staging`.
_DISCARDED = ".discarded-"
# Without file locks, the folder of a killed process is one in which nothing changed for so long.
_LEFT_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size, SHA-256 and modification time of a file when it was stored."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a cached model and its files.

    Args:
        name: Name the model was requested by.
        source: Description of where it came from.
        fingerprint: What it was made from: size and time of a local file, or the hash of one of
            the package index. Empty for a download from the hub.
        files: Records of its files, by name.
    """

    name: str
    source: str
    fingerprint: str
    files: Mapping[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True, slots=True)
class Store:
    """The model cache in the folder `root`. A model has a `key`, the name of its folder."""

    root: Path

    def model_dir(self, key: str) -> Path:
        """Return the folder of a finished model."""
        return self.root / "models" / key

    def staging_dir(self, key: str) -> Path:
        """Return the staging folder of a model; create it if it does not exist.

        Raises WeightsError if no folder could be renamed from there to the finished models.
        """
        folder = self.root / "staging" / key
        self._check_disk()
        with disk_errors(self.root):
            self._remove_discarded()
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_disk(self) -> None:
        """Raise WeightsError if finished models are on another disk than staging folders."""
        folders = [self.root / "models", self.root / "staging"]
        with disk_errors(self.root):
            models, staging = (path if path.exists() else self.root for path in folders)
            if models != staging and _disk(models) != _disk(staging):
                raise WeightsError(
                    f"{folders[0]} and {folders[1]} are on different disks: link the whole cache"
                    " folder instead, or choose another one",
                    parameter="cache_dir",
                )

    def finished_keys(self) -> tuple[str, ...]:
        """Return the keys of the finished models in alphabetical order."""
        return tuple(sorted(path.parent.name for path in self.root.glob(f"models/*/{MANIFEST}")))

    def read_manifest(self, key: str, *, name: str) -> Manifest | None:
        """Return the manifest of a finished model; None if there is none of this version.

        `name` is the model's name in messages. Raises CorruptWeights if the file is damaged.
        """
        path = self.model_dir(key) / MANIFEST
        file = TextFile(path, "the manifest", _MAX_MANIFEST_BYTES, WeightsError)
        try:
            if not path.exists():
                return None
            table = parse_json(file.read(), strict=False)
            return _manifest(table) if table["version"] == MANIFEST_VERSION else None
        except (WeightsError, OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise _damaged(path, name, "it cannot be read") from exc

    def check(self, key: str, manifest: Manifest) -> None:
        """Compare the files with the manifest by size and time; hash those with a new time.

        Raises CorruptWeights if a file differs.
        """
        touched = {}
        for file, record in manifest.files.items():
            path = self.model_dir(key) / file
            stat = _stat_file(path, manifest, record)
            if stat.st_mtime_ns != record.mtime_ns:
                if sha256_of(path) != record.sha256:
                    raise _damaged(path, manifest.name, "its content has changed")
                touched[file] = FileRecord(record.size, record.sha256, stat.st_mtime_ns)
        # A copied cache has new times. Record them, or every start would hash all files again.
        if touched:
            files = {**manifest.files, **touched}
            with contextlib.suppress(OSError):  # A cache that cannot be written still serves.
                write_manifest(self.model_dir(key), replace(manifest, files=files))

    def verify(self, key: str, manifest: Manifest, *, progress: Progress) -> None:
        """Hash every file; raise CorruptWeights if one differs from the manifest."""
        counter = ByteCounter(
            f"verifying {manifest.name}", total=manifest.size_bytes, progress=progress
        )
        for file, record in manifest.files.items():
            path = self.model_dir(key) / file
            _stat_file(path, manifest, record)
            if sha256_of(path, on_bytes=counter.add) != record.sha256:
                raise _damaged(path, manifest.name, "its content has changed")

    def commit(self, key: str, staged: Path, manifest: Manifest) -> Path:
        """Move a staged model to its final folder in one rename.

        Replaces a finished model of the same key, but not one of the same source and fingerprint:
        without locks, another process may have stored that meanwhile, and use it. Returns the final
        folder.
        """
        target = self.model_dir(key)
        with disk_errors(self.root):
            write_manifest(staged, manifest)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not _moved(staged, target) and not self._holds(key, manifest):
                self.discard(key)
                _moved(staged, target)
        return target

    def _holds(self, key: str, manifest: Manifest) -> bool:
        """Return whether there is a whole finished model of the same source and fingerprint."""
        try:
            stored = self.read_manifest(key, name=manifest.name)
            if stored is None:
                return False
            self.check(key, stored)
        except CorruptWeights:
            return False
        return (stored.source, stored.fingerprint) == (manifest.source, manifest.fingerprint)

    def discard(self, key: str) -> None:
        """Delete a finished model, if there is one; a rename takes it out of use first."""
        target = self.model_dir(key)
        self._check_disk()
        with disk_errors(self.root):
            if target.exists():
                (self.root / "staging").mkdir(exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    target.rename(_new_discarded(self.root / "staging"))
            self._remove_discarded()

    def _remove_discarded(self) -> None:
        for folder in (self.root / "staging").glob(f"{_DISCARDED}*"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str, *, notify: Notify) -> Iterator[str]:
        """Lock a model for this process; if another has the lock, notify the user and wait.

        Yields the key of the staging folder to use: the model's, or one of this process only where
        the file system has no locks.
        """
        folder = self.root / "locks"
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another mlxroute that is fetching {key}"
            handle = lock_file(folder / key, on_wait=lambda: notify(waiting))
        if handle is None:
            notify(f"{self.root} is on a file system without locks; continuing without one")
            with self._unshared_key(key) as own_key:
                yield own_key
            return
        try:
            yield key
        finally:
            # Removed while it is locked: `lock_file` opens the file again if it is gone.
            with handle, contextlib.suppress(OSError):
                (folder / key).unlink()

    @contextlib.contextmanager
    def _unshared_key(self, key: str) -> Iterator[str]:
        """Yield the key of a staging folder of its own, which takes over one that was left.

        At the end, what is still there is left to the next process, on any machine. What a killed
        process left is taken over only once it is old: another machine may have the same name.
        """
        staging, left = self.root / "staging", f"{key}.left"
        prefix = f"{key}.{platform.node().replace('/', '-')}."
        own = f"{prefix}{os.getpid()}-{os.urandom(4).hex()}"
        for folder in staging.glob("*"):
            match = re.fullmatch(rf"{re.escape(prefix)}(\d{{1,7}})(-[0-9a-f]{{8}})?", folder.name)
            if folder.name == left or (match and _was_left(folder, int(match[1]))):
                with contextlib.suppress(OSError):  # Another process has taken it over.
                    os.utime(folder)  # For others it is no longer old.
                    if not _moved(folder, staging / own):
                        folder.rename(_new_discarded(staging))
        try:
            yield own
        finally:
            with contextlib.suppress(OSError):
                (staging / own).rename(staging / left)

    def remove_staging(self, staging_key: str) -> None:
        """Remove a staging folder with its files."""
        folder = self.root / "staging" / staging_key
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(folder.parent)

    def trim_staging(self, staging_key: str) -> None:
        """Remove what is empty in a staging folder, and the folder if nothing can be resumed."""
        folder = self.root / "staging" / staging_key
        for path in sorted(folder.rglob("*"), reverse=True):
            _remove_empty(path)
        _remove_empty(folder)
        _remove_empty(folder.parent)


def _disk(path: Path) -> int:
    return path.stat().st_dev


def _new_discarded(staging: Path) -> Path:
    return staging / f"{_DISCARDED}{os.urandom(8).hex()}"


def _was_left(folder: Path, process_id: int) -> bool:
    """Return whether a staging folder's process is gone, and nothing has changed for some time."""
    # A killed process in another container may have had the id that this one has here.
    if process_id != os.getpid() and psutil.pid_exists(process_id):
        return False
    try:
        times_s = [path.lstat().st_mtime for path in (folder, *folder.rglob("*"))]
    except OSError:  # Something is changing right now.
        return False
    return time.time() - max(times_s) > _LEFT_AFTER_S


def _moved(folder: Path, target: Path) -> bool:
    """Rename a folder; return False if there is one with files at the target."""
    try:
        folder.rename(target)
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            path.rmdir()
        elif path.stat().st_size == 0:
            path.unlink()


def _manifest(table: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a JSON object. Raises ValueError, LookupError or TypeError."""
    files = {path: FileRecord(**entry) for path, entry in table["files"].items()}
    manifest = Manifest(table["name"], table["source"], table["fingerprint"], files)
    texts = [manifest.name, manifest.source, manifest.fingerprint]
    texts += [record.sha256 for record in files.values()]
    counts = [count for record in files.values() for count in (record.size, record.mtime_ns)]
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int for n in counts):
        raise ValueError("a value has another type")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a model's folder in one step, so that no half file is left."""
    files = {
        name: {"size": record.size, "sha256": record.sha256, "mtime_ns": record.mtime_ns}
        for name, record in sorted(manifest.files.items())
    }
    table = {
        "version": MANIFEST_VERSION,
        "name": manifest.name,
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
        "files": files,
    }
    replace_file(folder / MANIFEST, json.dumps(table, indent=2).encode() + b"\n")


def record_file(path: Path, *, sha256: str | None = None) -> FileRecord:
    """Return the record of a file; hash the file if its SHA-256 is not given."""
    stat = path.stat()
    return FileRecord(stat.st_size, sha256 or sha256_of(path), stat.st_mtime_ns)


def require_space(folder: Path, needed: int, *, purpose: str) -> None:
    """Raise NotEnoughSpace if a disk has too little free space.

    Args:
        folder: A folder on the disk.
        needed: Bytes that must be free.
        purpose: Subject of the message, as in `converting tiny`.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotEnoughSpace(
            f"{purpose} needs {_format_bytes(needed)} of disk space in {folder}, but only "
            f"{_format_bytes(free)} is free: free some, or choose another cache folder",
            parameter="cache_dir",
        )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Translate OSError to WeightsError or NotEnoughSpace; the message names the cache folder."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder) from exc
        raise WeightsError(
            f"cannot write to the cache folder {folder}: {exc.strerror or exc}; "
            "choose another cache folder",
            parameter="cache_dir",
        ) from exc


def disk_full(folder: Path) -> NotEnoughSpace:
    """Return the error for a full disk."""
    return NotEnoughSpace(
        f"the disk of {folder} is full: free some space, or choose another cache folder",
        parameter="cache_dir",
    )


def _format_bytes(count: int) -> str:
    """Return a byte count as text, such as `4.6 GB` or `92 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _stat_file(path: Path, manifest: Manifest, record: FileRecord) -> os.stat_result:
    """Return a cached file's status; raise CorruptWeights if it is missing or has another size."""
    try:
        stat = path.stat()
    except OSError as exc:
        raise _damaged(path, manifest.name, "it is missing") from exc
    if stat.st_size != record.size:
        raise _damaged(path, manifest.name, f"{stat.st_size} bytes instead of {record.size}")
    return stat


def _damaged(path: Path, name: str, reason: str) -> CorruptWeights:
    # The key of a file for llama.cpp is its name.
    flag = " --gguf" if path.parent.name.endswith(".gguf") else ""
    return CorruptWeights(
        f"cached file {path.name} of {name} is damaged ({reason}): "
        f"run `mlxroute pull {name}{flag}` to fetch it again"
    )
