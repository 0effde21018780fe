"""Where records come from: files of a corpus through fsspec, and the records of text and JSON-lines files.

Every error names the configuration field, the file and the fix.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from configs.errors import DataError
from configs.schema import CorpusSection
from data.python_source import FIELDS as PYTHON_FIELDS
from data.python_source import decode_source, python_records
from data.templates import where

STDLIB = "python://stdlib"
STDLIB_EXCLUDES = (
    *("site-packages", "dist-packages", "test", "tests", "*/test", "*/tests", "*/*/tests", "idlelib", "pydoc_data"),
    *("turtledemo", "config-*", "ensurepip/_bundled", "lib-dynload", "_sysconfigdata*"),
)
SUFFIXES = {"python": (".py",), "text": (".txt", ".md", ".rst"), "jsonl": (".jsonl", ".ndjson")}
KNOWN_FIELDS = {"python": PYTHON_FIELDS, "text": ("text", "path")}
PARAGRAPH_GROUP_CHARACTERS = 2000

Record = dict[str, str]


@dataclass(frozen=True)
class SourceFile:
    """One input file. `version` changes when the content does (as far as the file system can tell)."""

    url: str
    relative: str
    bytes: int
    version: str


def list_files(corpus: CorpusSection) -> list[SourceFile]:
    """Files of a corpus, sorted by relative path; raises DataError when there is none."""
    path, excludes, is_stdlib = corpus.path, corpus.exclude, corpus.path.rstrip("/") == STDLIB
    if is_stdlib:
        path, excludes = sysconfig.get_paths()["stdlib"], (*STDLIB_EXCLUDES, *corpus.exclude)
    elif path.startswith("python://"):
        raise DataError(f"{where(corpus, 'path')}: {path!r} is unknown; {STDLIB} is the only python:// path")
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        root = root.rstrip("/")
        filesystem.invalidate_cache()
        base, entries = _find(filesystem, root, excludes)
    except (ValueError, ImportError) as error:
        raise DataError(f"{where(corpus, 'path')}: fsspec cannot open {path!r} ({error})") from error
    except FileNotFoundError as error:
        raise DataError(
            f"{where(corpus, 'path')}: {path} does not exist; correct the path (it is relative to the configuration "
            "file) or put the corpus there"
        ) from error
    except OSError as error:
        raise DataError(f"{where(corpus, 'path')}: {path} cannot be listed: {error}") from error
    explicit = has_magic(root) or (len(entries) == 1 and root in entries)
    files = []
    for full, entry in entries.items():
        relative = full[len(base) :].lstrip("/") or PurePosixPath(full).name
        if not explicit and not _wanted(relative, corpus.kind):
            continue
        if not _excluded(relative, excludes):
            version = sys.version if is_stdlib else _version(filesystem, full, entry)
            files.append(SourceFile(filesystem.unstrip_protocol(full), relative, int(entry.get("size") or 0), version))
    if not files:
        suffixes = ", ".join(f"{suffix}[.gz]" for suffix in SUFFIXES[corpus.kind])
        raise DataError(
            f"{where(corpus, 'path')}: no file of {path} matches; kind {corpus.kind!r} takes {suffixes} in folders, "
            f"{len(entries)} other or excluded files are there; name files with a glob, or change path, kind or exclude"
        )
    return sorted(files, key=lambda file: file.relative)


def _find(filesystem: fsspec.AbstractFileSystem, root: str, excludes: tuple[str, ...]) -> tuple[str, dict[str, dict]]:
    """The folder that relative paths start from, and the files by full path."""
    if has_magic(root):
        parts = root.split("/")
        first = next(i for i, part in enumerate(parts) if has_magic(part))
        found = filesystem.glob(root, detail=True)
        return "/".join(parts[:first]), {path: entry for path, entry in found.items() if entry["type"] == "file"}
    entry = filesystem.info(root)
    if entry["type"] == "file":
        return root.rsplit("/", 1)[0], {root: entry}
    if not isinstance(filesystem, LocalFileSystem):
        return root, filesystem.find(root, detail=True)
    found = {}
    for folder, folders, files in filesystem.walk(root, detail=True):
        # Excluded folders (site-packages below the standard library) may hold more files than all others together.
        for name in [name for name in folders if _excluded(f"{folder}/{name}"[len(root) :].lstrip("/"), excludes)]:
            del folders[name]
        found.update((f"{folder}/{name}", entry) for name, entry in files.items())
    return root, found


def _wanted(relative: str, kind: str) -> bool:
    parts = relative.removesuffix(".gz").split("/")
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES[kind])


def _excluded(relative: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the path or a folder on it; `*` also matches slashes."""
    parts = relative.split("/")
    heads = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _version(filesystem: fsspec.AbstractFileSystem, full: str, entry: dict) -> str:
    for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created"):
        if entry.get(name) is not None:
            return f"{name}:{entry[name]}"
    return f"ukey:{filesystem.ukey(full)}"


def has_content(corpus: CorpusSection, file: SourceFile) -> bool:
    """Whether a file holds more than white space; raises DataError when it is not UTF-8 or no complete gzip file."""
    return any(line.strip() for line in _contents(corpus, file))


def _contents(corpus: CorpusSection, file: SourceFile) -> list[str]:
    with _opened(corpus, file) as stream:
        if corpus.kind == "python":
            return [decode_source(stream.read(), f"{where(corpus, 'path')}: {file.url}")]
        return list(_lines(corpus, file, stream))


def read_records(corpus: CorpusSection, file: SourceFile, counts: Counter[str]) -> Iterator[Record]:
    """Records of one file; what is left out is counted in `counts` by reason. Raises DataError naming the file."""
    with _opened(corpus, file) as stream:
        if corpus.kind == "python":
            yield from python_records(stream.read(), file.relative, counts, f"{where(corpus, 'path')}: {file.url}")
        elif corpus.kind == "text":
            yield from _paragraph_groups(corpus, file, stream)
        else:
            yield from _objects(corpus, file, stream)


@contextmanager
def _opened(corpus: CorpusSection, file: SourceFile) -> Iterator[IO[bytes]]:
    try:
        with fsspec.open(file.url, "rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if file.relative.endswith(".gz") else raw
    except FileNotFoundError as error:
        raise DataError(f"{where(corpus, 'path')}: {file.url} disappeared while it was read") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(
            f"{where(corpus, 'path')}: {file.url} is no complete gzip file ({error}); replace or exclude it"
        ) from error


def _lines(corpus: CorpusSection, file: SourceFile, stream: IO[bytes]) -> Iterator[str]:
    offset = 0
    for line in stream:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where(corpus, 'path')}: {file.url} is not UTF-8 (byte {offset + error.start}); convert the file "
                f"(iconv -t UTF-8) or exclude it with {where(corpus, 'exclude')}"
            ) from error
        yield (text.removeprefix("\ufeff") if offset == 0 else text).replace("\r\n", "\n")
        offset += len(line)


def _paragraph_groups(corpus: CorpusSection, file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """Whole paragraphs (blank lines end them) gathered until a record has about 2,000 characters."""
    group: list[str] = []
    size = 0
    for line in _lines(corpus, file, stream):
        group.append(line)
        size += len(line)
        if size >= PARAGRAPH_GROUP_CHARACTERS and not line.strip():
            yield {"text": "".join(group).strip("\n"), "path": file.relative}
            group, size = [], 0
    if "".join(group).strip():
        yield {"text": "".join(group).strip("\n"), "path": file.relative}


def _objects(corpus: CorpusSection, file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """One record per line; values that are no strings keep their JSON spelling, null becomes the empty string."""
    for number, line in enumerate(_lines(corpus, file, stream), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where(corpus, 'path')}: {file.url} line {number} is no JSON ({error.msg} at column {error.colno}); "
                "each line must hold one object: mend or remove the line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{where(corpus, 'path')}: {file.url} line {number} holds a {type(value).__name__}; each line must "
                'hold one object such as {"text": "..."}'
            )
        yield {name: _as_text(item) for name, item in value.items()}


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
