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
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from configs.errors import DataError
from configs.schema import CorpusSection
from data.hf_source import resolve
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
}
COLUMN = "{column}"


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
    names = {(file.urls, file.relative) for file in kept}
    training = [file for file in files if (file.urls, file.relative) not in names]
    if not training:
        raise DataError(
            f"{where(corpus, 'held_out')}: {corpus.held_out} holds all files of {corpus.path}, none is left to train "
            "on; hold fewer files out"
        )
    return training + kept


def _list(corpus: CorpusSection, field: str, path: str) -> list[SourceFile]:
    if corpus.kind == "hf":
        split = corpus.split if field == "path" else path
        name, version = resolve(corpus, split, where(corpus, field))
        return [SourceFile((name,), split, 0, version)]
    if corpus.kind == "parallel":
        return _aligned(corpus, field, path)
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
        filesystem, root = fsspec.core.url_to_fs(path)
        root = root.rstrip("/")
        filesystem.invalidate_cache()
        base, entries = _find(filesystem, root, excludes)
    except (ValueError, ImportError) as error:
        raise DataError(f"{where(corpus, field)}: fsspec cannot open {path!r} ({error})") from error
    except FileNotFoundError as error:
        raise DataError(
            f"{where(corpus, field)}: {path} does not exist; correct the path (it is relative to the configuration "
            "file) or put the corpus there"
        ) from error
    except OSError as error:
        raise DataError(f"{where(corpus, field)}: {path} cannot be listed: {error}") from error
    explicit = has_magic(root) or corpus.kind not in SUFFIXES or (len(entries) == 1 and root in entries)
    files = []
    for full, entry in entries.items():
        relative = full[len(base) :].lstrip("/") or PurePosixPath(full).name
        if not explicit and not _wanted(relative, corpus.kind):
            continue
        if not _excluded(relative, excludes):
            version = sys.version if is_stdlib else _version(filesystem, full, entry)
            files.append(
                SourceFile((filesystem.unstrip_protocol(full),), relative, int(entry.get("size") or 0), version)
            )
    if not files:
        suffixes = ", ".join(f"{suffix}[.gz]" for suffix in SUFFIXES.get(corpus.kind, ("any",)))
        raise DataError(
            f"{where(corpus, field)}: no file of {path} matches; kind {corpus.kind!r} takes {suffixes} in folders, "
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
