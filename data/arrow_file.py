"""Writing Arrow IPC files record batch by record batch with digests, and mapping them without keeping them open."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash

# An Arrow file begins with "ARROW1" and two bytes of padding; the schema message follows.
MAGIC_BYTES = 8
OPTIONS = pa.ipc.IpcWriteOptions(compression=None)
# Python's own mmap keeps the file open as long as it is mapped, and Arrow's has the kernel read all of it ahead.
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
MAP_FAILED = ctypes.c_void_p(-1).value


def view(array: pa.Array) -> np.ndarray:
    """The values of an array of numbers without nulls, not copied.

    Arrow's own conversion imports pandas first, which takes a new process a quarter of a second.
    """
    kind = np.dtype(str(array.type))
    content = array.buffers()[1]
    if content is None:
        return np.empty(0, dtype=kind)
    return np.frombuffer(content, dtype=kind, count=len(array), offset=array.offset * kind.itemsize)


class DigestingSink:
    """A file-like object that passes on what is written, counts it and takes digests of it.

    What is written behind the first `header_bytes` also goes to `part`, where one is set.
    """

    closed = False

    def __init__(self, file: IO[bytes], header_bytes: int = 0) -> None:
        self._file, self._header_bytes = file, header_bytes
        self.bytes = 0
        self.whole, self.part = xxhash.xxh3_128(), None

    def write(self, data: pa.Buffer) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.whole.update(view)
        if self.part is not None and self.bytes >= self._header_bytes:
            self.part.update(view)
        self.bytes += len(view)
        return len(view)

    @property
    def digest(self) -> str:
        """xxh3-128 of all bytes written so far, hex."""
        return self.whole.hexdigest()

    def flush(self) -> None:
        self._file.flush()


class DigestingWriter:
    """An uncompressed Arrow IPC file written to a binary file object; equal record batches give equal bytes.

    Leaving the context without an exception writes the footer; afterwards `bytes` and `digest` (xxh3-128, hex) are
    those of the whole file.
    """

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._header_bytes = MAGIC_BYTES + schema.serialize().size
        self._sink = DigestingSink(file, self._header_bytes)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), schema, options=OPTIONS)

    def write(self, batch: pa.RecordBatch, digest: Any) -> tuple[int, int]:
        """Append a record batch, message header included, to the file and to `digest`; returns (offset, bytes)."""
        # The schema is written along with the first record batch.
        offset = max(self._sink.bytes, self._header_bytes)
        self._sink.part = digest
        self._writer.write_batch(batch)
        return offset, self._sink.bytes - offset

    def __enter__(self) -> DigestingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._sink.part = xxhash.xxh3_64()
            self._writer.close()

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._sink.bytes

    @property
    def digest(self) -> str:
        """xxh3-128 of all bytes written so far, hex."""
        return self._sink.digest


class _Map:
    """A read-only memory map of a file of `size` bytes, as long as this object lives."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == MAP_FAILED:
            raise OSError(ctypes.get_errno(), "cannot be mapped", file.name)
        self.address = address
        # At the end of the process the kernel unmaps, when no array can be in use any more.
        weakref.finalize(self, LIBC.munmap, address, size).atexit = False


def mapped(path: str) -> pa.Buffer:
    """A file as a view of its memory map, which stays mapped as long as the view or a part of it lives.

    No file descriptor stays open. A page that is touched is read from disk alone, without its neighbours: rows are
    read in shuffled order, and `read_soon` says which pages come next. Raises OSError.
    """
    with open(path, "rb", 0) as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        if not size:
            return pa.py_buffer(b"")
        whole = _Map(file, size)
    content = pa.foreign_buffer(whole.address, size, whole)
    _advise(content, mmap.MADV_RANDOM)
    return content


def read_soon(content: pa.Buffer) -> None:
    """Have the kernel start reading a part of a mapped file from disk, in one piece; does not wait."""
    _advise(content, mmap.MADV_WILLNEED)


def _advise(content: pa.Buffer, advice: int) -> None:
    skipped = content.address % mmap.PAGESIZE
    if content.size and LIBC.madvise(content.address - skipped, content.size + skipped, advice):
        raise OSError(ctypes.get_errno(), "madvise failed")
