"""Storage of runs and prepared data: one folder or fsspec URL, with whole-object writes and create-if-absent.

Local writes go to a temporary name, are flushed to disk and moved into place, so a reader sees the old object, the
new one or none. Object stores give the same by nature: an object appears when its upload is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec
from fsspec.core import split_protocol

from configs.errors import ConfigError, StorageError
from configs.redaction import advice, holds_secret


def absolute_url(url: str, base: str | None = None) -> str:
    """`url` with a scheme left as it is; a local path made absolute, relative to `base` or the current folder."""
    protocol, path = split_protocol(url)
    if protocol not in (None, "file", "local"):
        return url.rstrip("/")
    return str((Path(base or Path.cwd()) / path).absolute().resolve())


class Storage:
    """One root (local folder or fsspec URL); every path given to a method is relative to it."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL with a key in it, or of a kind that nothing here serves."""
        if holds_secret(url):
            raise ConfigError(advice("storage", url))
        self.url = absolute_url(url)
        protocol, _ = split_protocol(self.url)
        self.is_local = protocol is None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"storage {url!r}: fsspec has no file system for {protocol!r} here ({error}); use a local folder or "
                "install the package that serves it (s3fs for s3://, gcsfs for gs://)"
            ) from error
        self._root = self._root.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple:
        return Storage, (self.url,)

    def child(self, *parts: str) -> Storage:
        """The storage rooted at a folder below this one."""
        return Storage("/".join([self.url, *[part.strip("/") for part in parts if part]]))

    def _full(self, path: str) -> str:
        parts = [part for part in path.split("/") if part]
        if ".." in parts:
            raise ValueError(f"path {path!r} leaves its storage")
        return "/".join([self._root, *parts])

    def local_path(self, path: str = "") -> str | None:
        """The operating system's path of an entry, or None where storage is not local."""
        return self._full(path) if self.is_local else None

    def read_bytes(self, path: str) -> bytes:
        """Content of an object; raises FileNotFoundError when it is absent."""
        return self._fs.cat_file(self._full(path))

    def read_text(self, path: str) -> str:
        """Content of a UTF-8 object; raises FileNotFoundError when it is absent."""
        return self.read_bytes(path).decode()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace an object, whole or not at all; raises StorageError naming the path."""
        with self.open(path, "wb") as file:
            file.write(data)

    def write_text(self, path: str, text: str) -> None:
        """Write or replace a UTF-8 object, whole or not at all."""
        self.write_bytes(path, text.encode())

    def create(self, path: str, data: bytes) -> bool:
        """Create an object if it is absent and return True; return False and change nothing when it exists.

        Local: `os.link`, atomic among processes and on NFS. S3: a conditional put. Elsewhere: check, then write,
        which is safe with a single writer only.
        """
        full = self._full(path)
        if self.is_local:
            temporary = self._temporary(full)
            with self._errors(path):
                Path(full).parent.mkdir(parents=True, exist_ok=True)
                try:
                    _write_durably(temporary, data)
                    os.link(temporary, full)
                except FileExistsError:
                    return False
                finally:
                    Path(temporary).unlink(missing_ok=True)
                sync(Path(full).parent)
            return True
        self._fs.invalidate_cache()
        if "s3" in self._protocols:
            try:
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            return True
        if self._fs.exists(full):
            return False
        self.write_bytes(path, data)
        return True

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def exists(self, path: str = "") -> bool:
        """Whether an object or a folder with content is there."""
        self._fs.invalidate_cache()
        return self._fs.exists(self._full(path))

    def size(self, path: str) -> int:
        """Bytes of an object; raises FileNotFoundError when it is absent."""
        self._fs.invalidate_cache()
        return int(self._fs.size(self._full(path)))

    def names(self, path: str = "") -> list[str]:
        """Sorted names of the entries directly below a folder; empty when the folder is absent."""
        full = self._full(path)
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(full, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != full}
        return sorted(name for name in names if not name.startswith(".tmp-"))

    def remove_unfinished(self, path: str = "") -> None:
        """Remove what writers that were killed left directly below a folder; nobody may be writing there."""
        full = self._full(path)
        try:
            entries = self._fs.ls(full, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.rsplit("/", 1)[-1].startswith(".tmp-"):
                self._fs.rm_file(entry)

    def remove(self, path: str = "") -> None:
        """Remove an object or a folder with all below it; absent is fine."""
        full = self._full(path)
        with self._errors(path):
            if self.is_local:
                target = Path(full)
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            elif self._fs.exists(full):
                self._fs.rm(full, recursive=True)

    @contextmanager
    def open(self, path: str, mode: str = "rb") -> Iterator[IO[bytes]]:
        """A binary file object; for "wb" the object appears when the block ends without an exception."""
        full = self._full(path)
        if mode == "rb":
            with self._fs.open(full, "rb") as file:
                yield file
            return
        if mode != "wb":
            raise ValueError(f"mode {mode!r}: only 'rb' and 'wb' are meaningful on every store")
        if not self.is_local:
            # Built on local disk first: only a complete object is ever uploaded, on every kind of store.
            with tempfile.NamedTemporaryFile(prefix="telar-upload-") as file:
                yield file
                file.flush()
                with self._errors(path):
                    self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
                    self._fs.put_file(file.name, full)
            return
        temporary = self._temporary(full)
        with self._errors(path):
            Path(full).parent.mkdir(parents=True, exist_ok=True)
            try:
                with Path(temporary).open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(full)
            finally:
                Path(temporary).unlink(missing_ok=True)
            sync(Path(full).parent)

    def _temporary(self, full: str) -> str:
        folder, name = full.rsplit("/", 1)
        return f"{folder}/.tmp-{name}-{uuid.uuid4().hex}"

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and error.filename is None:
                raise
            raise StorageError(
                f"cannot write {self._full(path)!r} in storage {self.url!r}: {error.strerror or error}; "
                "check that the path is a folder you may write and that space is left, or choose another storage "
                "with --storage or run.storage"
            ) from error


def _write_durably(path: str, data: bytes) -> None:
    with Path(path).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or names in a folder, survive a power cut (POSIX: a rename is durable once its folder is)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SpooledText:
    """Text that grows in storage: appended in memory and on disk, the object rewritten at most every few seconds.

    Object stores cannot append, so the single writer keeps the whole text and rewrites the object. Local storage is
    appended directly. Content that the object had before is kept.
    """

    def __init__(self, storage: Storage, path: str, flush_seconds: float = 30.0) -> None:
        self._storage, self._path, self._flush_seconds = storage, path, flush_seconds
        self._lock = threading.Lock()
        self._local = None
        self._parts: list[str] = []
        self._dirty = False
        self._flushed_at = time.monotonic()
        if storage.is_local:
            full = Path(storage.local_path(path) or "")
            full.parent.mkdir(parents=True, exist_ok=True)
            self._local = full.open("a", encoding="utf-8")
        elif storage.exists(path):
            self._parts.append(storage.read_text(path))

    def append(self, line: str) -> bool:
        """Add one line, with a newline when it lacks one; whether storage has it, and all before it, already."""
        text = line if line.endswith("\n") else line + "\n"
        with self._lock:
            if self._local is not None:
                self._local.write(text)
                self._local.flush()
                return True
            self._parts.append(text)
            self._dirty = True
            due = time.monotonic() - self._flushed_at >= self._flush_seconds
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Bring the object in storage up to date now."""
        with self._lock:
            if self._local is not None or not self._dirty:
                return
            self._parts = ["".join(self._parts)]
            self._storage.write_text(self._path, self._parts[0])
            self._dirty, self._flushed_at = False, time.monotonic()

    def close(self) -> None:
        """Flush and release the file."""
        self.flush()
        with self._lock:
            if self._local is not None and not self._local.closed:
                self._local.close()
