"""Curves for TensorBoard: event files in RUN/tensorboard, on any storage, written record by record.

TensorBoard reads all files of a folder as one run. A step that comes again after a restart is announced by a session
start (TensorFlow's `SessionLog.START`), at which TensorBoard drops what it had from that step on.
"""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from cluster.storage import Storage
from configs.errors import StorageError
from jobs.trackers.base import Ids

# Object stores cannot append: the object is written anew so often, and a new one begun when it is so large.
FLUSH_SECONDS = 30.0
ROTATE_BYTES = 4 * 2**20


class TensorBoard:
    """One writer's files; its file names sort after those of the writers before it."""

    errors = (StorageError, OSError)

    def __init__(self, folder: Storage, run: str, project: str, kept: Ids, settings: Mapping[str, Any]) -> None:
        kept.keep("tensorboard", "tensorboard")
        self._folder = folder.child("tensorboard")
        self._flushed_at, self._last_step = time.monotonic(), -1
        self._parts = 0
        self._id = f"{time.time_ns() // 1000:020d}.{uuid.uuid4().hex[:8]}"
        self._begin()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One event with all figures of a step."""
        if step <= self._last_step or self._last_step < 0:
            self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._last_step = step
        values = [Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._flush()
        if self._buffer.tell() > ROTATE_BYTES:
            self._flush()
            self._begin()

    def close(self, state: str) -> None:
        """Write out what is left."""
        self._flush()

    def _begin(self) -> None:
        self._parts += 1
        # TensorBoard looks for `tfevents` in names and reads them in their order.
        self._path = f"events.out.tfevents.{self._id}.{self._parts:06d}"
        self._buffer = io.BytesIO()
        self._records = RecordWriter(self._buffer)
        self._write(Event(file_version="brain.Event:2"))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        self._folder.write_bytes(self._path, self._buffer.getvalue())
        self._flushed_at = time.monotonic()
