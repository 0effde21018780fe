"""Input files of corpora as streams of bytes and of lines, whichever file system they are on, .gz unpacked.

Every error names the configuration field, the file and the fix.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from configs.errors import DataError, StorageError
from configs.schema import CorpusSection
from data.templates import where

# Seconds a web server may be silent; a whole file may take as long as it needs.
SILENCE_SECONDS = 60
BUFFER_BYTES = 1 << 20
MOST_LINE_BYTES = 256 * 2**20
ZIPPED = ".gz"


def is_zipped(url: str) -> bool:
    """Whether a URL, maybe one inside an archive, names a gzip file."""
    return url.partition("::")[0].endswith(ZIPPED)


@contextmanager
def opened(corpus: CorpusSection, url: str, seekable: bool = False) -> Iterator[IO[bytes]]:
    """The content of an input file; with `seekable`, .gz is unpacked to a temporary file first.

    A file of a web server is copied to a temporary file, since many servers give files only from their beginning.
    Raises DataError for a file that is gone or is no whole gzip file, StorageError when it cannot be read for now.
    """
    field = where(corpus, "path")
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(_raw(url))
            if not is_zipped(url):
                yield raw
                return
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=raw))
            if seekable:
                copy = stack.enter_context(tempfile.TemporaryFile(prefix="telar-unpacked-"))
                shutil.copyfileobj(unpacked, copy, BUFFER_BYTES)
                copy.seek(0)
                yield copy
            else:
                # GzipFile itself would give lines, but each through a layer written in Python.
                yield stack.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{field}: {url} is no complete gzip file ({error}); replace or exclude it") from error
    except FileNotFoundError as error:
        raise DataError(f"{field}: {url} disappeared while it was read") from error
    except IsADirectoryError as error:
        raise DataError(f"{field}: {url} is a folder; name files, or exclude it") from error
    except read_errors() as error:
        raise StorageError(
            f"{field}: {url} cannot be read ({said(error)}); see that it can and run the same command again, which "
            "keeps what is prepared already"
        ) from error


def read_errors() -> tuple[type[BaseException], ...]:
    """What file systems raise when a file cannot be read now and maybe could be later."""
    # Errors of the library for web servers; where it was not imported it raised none.
    library = sys.modules.get("aiohttp")
    return (OSError, TimeoutError, *([library.ClientError] if library else []))


def said(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_web(protocol: str | tuple[str, ...]) -> bool:
    """Whether a file system's protocol is that of web servers."""
    return "http" in protocol if isinstance(protocol, tuple) else protocol in ("http", "https")


def _web_filesystem() -> fsspec.AbstractFileSystem:
    """Where silence ends a transfer, not its length (the library allows 5 minutes)."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return fsspec.filesystem("http", client_kwargs={"timeout": timeout})


@contextmanager
def _raw(url: str) -> Iterator[IO[bytes]]:
    filesystem, path = url_to_fs(url)
    if is_web(filesystem.protocol):
        with tempfile.NamedTemporaryFile(prefix="telar-download-") as file:
            _web_filesystem().get_file(path, file.name)
            yield file
    elif isinstance(filesystem, LocalFileSystem):
        with open(path, "rb", BUFFER_BYTES) as file:  # noqa: PTH123
            yield file
    else:
        # Lines of fsspec's own files are found in Python, a read and a seek for each.
        with filesystem.open(path, "rb") as file, io.BufferedReader(_Adapter(file), BUFFER_BYTES) as buffered:
            yield buffered


class _Adapter(io.RawIOBase):
    """A file of fsspec as what io.BufferedReader asks for."""

    def __init__(self, inner: IO[bytes]) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._inner.seekable()

    def readinto(self, buffer: memoryview) -> int:
        content = self._inner.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()


def lines(corpus: CorpusSection, url: str, stream: IO[bytes], cut_at: int | None = None) -> Iterator[str]:
    """Lines with their end, a newline also where the file has carriage return and newline; no byte order mark.

    With `cut_at` a line of more bytes is given in pieces, cut after a blank where it has one. Without, a line of more
    than MOST_LINE_BYTES raises DataError, and so do bytes that are no UTF-8; both are named by their place.
    """
    offset = number = 0
    rest = b""
    most = cut_at or MOST_LINE_BYTES
    while line := rest + stream.readline(most + 1 - len(rest)):
        rest = b""
        number += 1
        if len(line) > most:
            if cut_at is None:
                raise DataError(
                    f"{where(corpus, 'path')}: {url} line {number} has more than {most:,} bytes and would be held in "
                    "memory whole; break it into lines, or correct kind"
                )
            place = _place_to_cut(line)
            line, rest = line[:place], line[place:]
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_text(corpus, url, offset + error.start) from error
        yield (text.removeprefix("\ufeff") if offset == 0 else text).replace("\r\n", "\n")
        offset += len(line)


def _place_to_cut(line: bytes) -> int:
    """After the last blank, else before the last character, so that no character and no pair of line ends is cut."""
    place = line.rfind(b" ", 0, len(line) - 1) + 1
    if not place:
        place = len(line) - (2 if line.endswith(b"\r\n") else 1)
        # Bytes 10xxxxxx continue a character; where all do it is no UTF-8, which decoding will say.
        while place and line[place] & 0xC0 == 0x80:
            place -= 1
    return place or len(line)


def not_text(corpus: CorpusSection, url: str, place: int) -> DataError:
    """The error for a file whose byte at `place` is no UTF-8."""
    return DataError(
        f"{where(corpus, 'path')}: {url} is not UTF-8 (byte {place}); convert the file (iconv -t UTF-8) or exclude it "
        f"with {where(corpus, 'exclude')}"
    )
