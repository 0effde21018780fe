"""Reads a run's growing files piece by piece, for those who look at it again and again."""

from __future__ import annotations

import json
import os
from collections import deque
from typing import Any

from cluster.storage import Storage
from jobs.run_view import RunView, view

# Of a file that is longer when it is first read, the end.
FIRST_BYTES = 8 * 2**20
EVENTS_KEPT = 2000
# Records of steps that are kept; every second one is dropped when there are more.
RECORDS_KEPT = 8192


class GrowingLines:
    """New objects of a JSONL file since the last call; a last line that is still being written waits."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._read_until: int | None = None

    def fresh(self) -> list[dict[str, Any]]:
        """Objects that were not returned before; none where the file is absent."""
        try:
            with self._storage.open(self._path) as file:
                size = file.seek(0, os.SEEK_END)
                start = max(0, size - FIRST_BYTES) if self._read_until is None else self._read_until
                if size <= start:
                    return []
                file.seek(start)
                data = file.read(size - start)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")
        if self._read_until is None and start > 0:
            # It is cut.
            lines = lines[1:]
        self._read_until = start + len(whole)
        return [json.loads(line) for line in lines if line.strip()]


class RunReader:
    """One run, looked at from time to time."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._folder, self._run = storage.child(run), run
        self._steps = GrowingLines(self._folder, "metrics.jsonl")
        self._events = GrowingLines(self._folder, "events.jsonl")
        self._records: list[dict[str, Any]] = []
        self._kept_events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)

    def status(self) -> dict[str, Any] | None:
        """Content of status.json, or None before the controller wrote it."""
        try:
            return json.loads(self._folder.read_text("status.json"))
        except FileNotFoundError:
            return None

    def look(self, now: float) -> RunView:
        """The run as its files show it at `now`, Unix seconds."""
        self._records += self._steps.fresh()
        while len(self._records) > RECORDS_KEPT:
            # The newest stay, as pace is taken from them.
            self._records = self._records[: RECORDS_KEPT // 2 : 2] + self._records[RECORDS_KEPT // 2 :]
        self._kept_events.extend(self._events.fresh())
        return view(self._run, self.status(), self._records, list(self._kept_events), now)
