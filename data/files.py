"""Which files a corpus consists of, found through fsspec, and which of them are held out by name.

Every error names the configuration field, the path and the fix.
"""

from __future__ import annotations

import fnmatch
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import fsspec
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from configs.errors import DataError, StorageError
from configs.schema import CorpusSection
from data import drawn_shapes
from data.hf_source import resolve
from data.opening import is_web, read_errors, said
from data.templates import where

STDLIB = "python://stdlib"
STDLIB_EXCLUDES = (
    *("site-packages", "dist-packages", "test", "tests", "*/test", "*/tests", "*/*/tests", "idlelib", "pydoc_data"),
    *("turtledemo", "config-*", "ensurepip/_bundled", "lib-dynload", "_sysconfigdata*"),
)
SUFFIXES = {
    "python": (".py",),
    "text": (".txt", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "babi": (".txt",),
}
COLUMN = "{column}"
# Fields of fsspec's entries that change with the content, by file system; the most telling one first.
VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "mtime", "LastModified", "last_modified", "Last-Modified"),
    "created",
)


@dataclass(frozen=True)
class SourceFile:
    """One input file. `version` changes when the content does (as far as the file system can tell).

    For kind parallel it stands for aligned files, `urls` in the order of the columns; for kind hf for one split.
    """

    urls: tuple[str, ...]
    relative: str
    bytes: int
    version: str
    held_out: bool = False

    @property
    def url(self) -> str:
        """How messages name it."""
        return " + ".join(self.urls)


def list_files(corpus: CorpusSection) -> list[SourceFile]:
    """Files of a corpus, sorted by relative path, then those of `held_out`; raises DataError when there is none."""
    files = _list(corpus, "path", corpus.path)
    if corpus.held_out is None:
        return files
    kept = [replace(file, held_out=True) for file in _list(corpus, "held_out", corpus.held_out)]
    # Relative paths depend on the folder that a field names, so files are the same when their URLs are.
    names = {_identity(corpus, file) for file in kept}
    training = [file for file in files if _identity(corpus, file) not in names]
    if not training:
        raise DataError(
            f"{where(corpus, 'held_out')}: {corpus.held_out} holds all files of {corpus.path}, none is left to train "
            "on; hold fewer files out"
        )
    return training + kept


def _identity(corpus: CorpusSection, file: SourceFile) -> tuple[str, ...]:
    return (*file.urls, file.relative) if corpus.kind == "hf" else file.urls


def _list(corpus: CorpusSection, field: str, path: str) -> list[SourceFile]:
    if corpus.kind == "hf":
        split = corpus.split if field == "path" else path
        name, version = resolve(corpus, split, where(corpus, field))
        return [SourceFile((name,), split, 0, version)]
    if corpus.kind == "parallel":
        return _aligned(corpus, field, path)
    if corpus.kind == "shapes":
        if drawn_shapes.side_of(path) is None:
            raise DataError(
                f"{where(corpus, field)}: {path!r} names no drawn shapes; write {drawn_shapes.SCHEME}SIDE with a side "
                f"of {drawn_shapes.SMALLEST_SIDE} to {drawn_shapes.LARGEST_SIDE} pixels"
            )
        return [SourceFile((path,), "shapes", 0, drawn_shapes.VERSION)]
    return _list_path(corpus, field, path)


def _aligned(corpus: CorpusSection, field: str, path: str) -> list[SourceFile]:
    """One entry per group of aligned files; files of each column are matched in the order of their names."""
    columns = [_list_path(corpus, field, path.replace(COLUMN, column)) for column in corpus.columns]
    if len({len(files) for files in columns}) > 1:
        found = ", ".join(f"{name}: {len(files)}" for name, files in zip(corpus.columns, columns, strict=True))
        raise DataError(
            f"{where(corpus, field)}: {path} matches unequal numbers of files ({found}); each column "
            "needs a file for each of the others"
        )
    return [
        SourceFile(
            tuple(file.urls[0] for file in group),
            "+".join(file.relative for file in group),
            sum(file.bytes for file in group),
            " ".join(file.version for file in group),
        )
        for group in zip(*columns, strict=True)
    ]


def _list_path(corpus: CorpusSection, field: str, path: str) -> list[SourceFile]:
    given, excludes, is_stdlib = path, corpus.exclude, path.rstrip("/") == STDLIB
    if is_stdlib:
        path, excludes = sysconfig.get_paths()["stdlib"], (*STDLIB_EXCLUDES, *corpus.exclude)
    elif path.startswith("python://"):
        raise DataError(f"{where(corpus, field)}: {given!r} is unknown; {STDLIB} is the only python:// path")
    try:
        filesystem, root = url_to_fs(path)
        root = root.rstrip("/")
        filesystem.invalidate_cache()
        base, entries, explicit = _find(filesystem, root, is_folder=path.endswith("/"), excludes=excludes)
        files = []
        for full, entry in entries.items():
            relative = full[len(base) :].lstrip("/") or PurePosixPath(full).name
            if not (explicit or corpus.kind not in SUFFIXES or _wanted(relative, corpus.kind)):
                continue
            if _excluded(relative, excludes):
                continue
            known = _known(filesystem, full, entry)
            if known["type"] == "file":
                version = sys.version if is_stdlib else _version(filesystem, full, known)
                files.append(SourceFile((_url(filesystem, full, path),), relative, int(known["size"] or 0), version))
    except (ValueError, ImportError) as error:
        raise DataError(f"{where(corpus, field)}: fsspec cannot open {path!r} ({error})") from error
    except FileNotFoundError as error:
        cause = error.__cause__
        # fsspec says of every trouble with a web server that the file is not found.
        if cause is not None and not isinstance(cause, FileNotFoundError) and getattr(cause, "status", 0) != 404:
            raise _unreachable(corpus, field, path, cause) from error
        raise DataError(
            f"{where(corpus, field)}: {path} does not exist; correct the path (it is relative to the configuration "
            "file) or put the corpus there"
        ) from error
    except read_errors() as error:
        raise _unreachable(corpus, field, path, error) from error
    if not files:
        suffixes = ", ".join(f"{suffix}[.gz]" for suffix in SUFFIXES.get(corpus.kind, ("any",)))
        raise DataError(
            f"{where(corpus, field)}: no file of {path} matches; kind {corpus.kind!r} takes {suffixes} in folders, "
            f"{len(entries)} other or excluded files are there; name files with a glob, or change path, kind or exclude"
        )
    return sorted(files, key=lambda file: file.relative)


def _unreachable(corpus: CorpusSection, field: str, path: str, error: BaseException) -> StorageError:
    return StorageError(
        f"{where(corpus, field)}: {path} cannot be listed ({said(error)}); correct the path, or see that this machine "
        "can reach it and may read it"
    )


def _find(
    filesystem: fsspec.AbstractFileSystem, root: str, is_folder: bool, excludes: tuple[str, ...]
) -> tuple[str, dict[str, dict], bool]:
    """The folder that relative paths start from, files by full path, and whether files were named, not a folder.

    `is_folder`: the path ends in a slash, which for web servers is all that tells a folder.
    """
    if has_magic(root) and not filesystem.exists(root):
        parts = root.split("/")
        first = next(i for i, part in enumerate(parts) if has_magic(part))
        found = filesystem.glob(root, detail=True)
        files = {path: entry for path, entry in found.items() if entry["type"] != "directory"}
        return "/".join(parts[:first]), files, True
    if is_folder and is_web(filesystem.protocol):
        return root, filesystem.find(f"{root}/", detail=True), False
    entry = filesystem.info(root)
    if entry["type"] == "file":
        return root.rsplit("/", 1)[0], {root: entry}, True
    if not isinstance(filesystem, LocalFileSystem):
        return root, filesystem.find(root, detail=True), False
    found = {}
    for folder, folders, files in filesystem.walk(root, detail=True):
        # Excluded folders (site-packages below the standard library) may hold more files than all others together.
        for name in [name for name in folders if _excluded(f"{folder}/{name}"[len(root) :].lstrip("/"), excludes)]:
            del folders[name]
        found.update((f"{folder}/{name}", entry) for name, entry in files.items())
    return root, found, False


def _known(filesystem: fsspec.AbstractFileSystem, full: str, entry: dict) -> dict:
    """What the file system knows of a file, where a listing tells less: of links locally, on web servers of all."""
    if entry.get("islink") or entry.get("size") is None:
        return {**entry, **filesystem.info(full)}
    return entry


def _url(filesystem: fsspec.AbstractFileSystem, full: str, path: str) -> str:
    """The URL of a file below `path`; for a file in an archive (zip://NAME::ARCHIVE) that of the archive follows."""
    first, chained, archive = path.partition("::")
    url = filesystem.unstrip_protocol(full)
    return f"{url}::{archive}" if chained and "://" in first else url


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
    for name in VERSIONS:
        if entry.get(name) is not None:
            return f"{name}:{entry[name]}"
    return f"ukey:{filesystem.ukey(full)}"
