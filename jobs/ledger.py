"""The run's books: status.json, metrics.jsonl, events.jsonl and the commits of checkpoints. One writer per run.

Free of Ray and DeepSpeed: the controller keeps it in an actor, `jobs.train_local` in the parent process.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import commit
from cluster.storage import SpooledText, Storage
from configs.errors import StorageError
from configs.redaction import redacted
from configs.schema import RunConfig
from jobs.trackers.base import Feed, open_trackers

# An object of this name in the run's folder asks the controller to commit and stop.
STOP_REQUEST = "stop-requested"


class Ledger:
    """Everything that is written about one run while it goes on; methods may be called from any thread."""

    def __init__(self, storage: Storage, run: str, config: RunConfig) -> None:
        self.folder = storage.child(run)
        self.checkpoints = self.folder.child("checkpoints")
        self._config = config
        self._metrics = SpooledText(self.folder, "metrics.jsonl")
        self._events = SpooledText(self.folder, "events.jsonl")
        self._log = SpooledText(self.folder, "logs/job.log")
        self._lock = threading.RLock()
        self._reported: dict[tuple[int, int], dict[int, commit.RankFile]] = {}
        # Paths of damaged shards whose samples are masked: all, and those that were said so far.
        self._quarantined: set[str] = set()
        self._told: set[str] = set()
        self._lines: list[str] = []
        self._attempt = 0
        # Step of the last line of metrics.jsonl, None before it was looked up; of the attempt: the last that came, and
        # that lies in storage.
        self._last: int | None = None
        self._known = self._written = 0
        self._trackers: list[Feed] | None = None
        self.status: dict[str, Any] = {
            "run": run,
            "state": "preparing",
            "stage": None,
            "step": 0,
            "steps": config.train.steps,
            "tokens": 0,
            "loss": None,
            "tokens_per_second": None,
            "data_wait_seconds": None,
            "world_size": 0,
            "attempt": 0,
            "last_commit_step": None,
            "message": None,
            "updated_unix": time.time(),
            "started_unix": time.time(),
        }
        latest, _ = commit.latest(self.checkpoints)
        if latest is not None:
            self.status.update(step=latest.step, last_commit_step=latest.step, tokens=latest.manifest.get("tokens", 0))
            self._quarantined.update(latest.manifest["data_state"]["quarantined"])
            self._told |= self._quarantined

    def event(self, event: str, **detail: Any) -> None:
        """Append one line to events.jsonl."""
        self._events.append(redacted(json.dumps({"unix_seconds": time.time(), "event": event, **detail})))
        self._events.flush()

    def say(self, line: str) -> None:
        """Add a line to what people following the run read, and to logs/job.log."""
        line = redacted(line)
        with self._lock:
            self._lines.append(line)
        self._log.append(line)

    def lines(self, after: int) -> list[str]:
        """Lines said since the first `after` ones."""
        with self._lock:
            return self._lines[after:]

    def update(self, **fields: Any) -> None:
        """Change fields of the status and write status.json."""
        with self._lock:
            self.status.update(fields)
            self.write_status()

    def write_status(self) -> None:
        """Renew the lease: write status.json with the time of now."""
        with self._lock:
            self.status["updated_unix"] = time.time()
            self.folder.write_text("status.json", redacted(json.dumps(self.status, indent=1)))

    def next_attempt(self) -> int:
        """The attempt number after all that were taken."""
        taken = [int(name.split("-")[1].split(".")[0]) for name in self.folder.names("attempts")]
        return max(taken, default=0) + 1

    def begin_attempt(self) -> int:
        """Take the next attempt number of this run; no two controllers ever get the same one."""
        number = self.next_attempt()
        if self._trackers is None:
            self._trackers = open_trackers(self._config, self.folder, self.status["run"], self._tell_problem)
        while not self.folder.create(f"attempts/attempt-{number:03d}.json", json.dumps({"at": time.time()}).encode()):
            number += 1
        with self._lock:
            self._attempt, self._known, self._written = number, 0, 0
            self._reported.clear()
        return number

    def record_step(self, record: Mapping[str, Any]) -> bool:
        """One step of rank 0; whether it is news. Steps of an attempt that is over, and older ones, are ignored."""
        with self._lock:
            if record["attempt"] != self._attempt or record["step"] <= self._known:
                return False
            self._known = record["step"]
            self._append(record)
            keep = ("step", "tokens", "loss", "tokens_per_second", "data_wait_seconds", "world_size", "attempt")
            self.status.update({name: record[name] for name in keep})
        every, step = self._config.tracking.log_every_steps, record["step"]
        if step % every == 0 or step == self._config.train.steps or step == 1:
            self.say(step_line(record, self._config.train.steps))
        return True

    def steps_known(self, attempt: int) -> tuple[int, int]:
        """The last steps of the attempt that the books know, and that storage has; 0, 0 when it does not train."""
        with self._lock:
            return (self._known, self._written) if attempt == self._attempt else (0, 0)

    def complete(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write down steps of an attempt that is over whose records were lost with a process: those after the last."""
        with self._lock:
            if self._last is None:
                self._metrics.flush()
                known = self.folder.exists("metrics.jsonl") and self.folder.read_text("metrics.jsonl").splitlines()
                self._last = json.loads(known[-1])["step"] if known else 0
            for record in records:
                if record["step"] > self._last:
                    self._append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._last = record["step"]
        if self._metrics.append(json.dumps(record)):
            self._written = self._last
        for tracker in self._trackers or ():
            tracker.record(record)

    def last_commit(self) -> dict[str, Any]:
        """Step and time of the newest commit of this controller, as they stand in status.json."""
        with self._lock:
            return {name: self.status.get(name) for name in ("last_commit_step", "last_commit_unix_seconds")}

    def record_rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """A rank has written its part of a checkpoint; the last one of a step commits it.

        A commit that fails is reported and does not stop the run: the checkpoint before it stays the latest.
        """
        with self._lock:
            if attempt != self._attempt:
                return
            files = self._reported.setdefault((step, attempt), {})
            files[file.rank] = file
            # Each rank knows of the damaged shards that it met itself.
            self._quarantined.update(extra["data_state"]["quarantined"])
            if len(files) < world_size:
                return
            del self._reported[(step, attempt)]
        self._tell_quarantined(extra)
        try:
            # A run that goes on from this commit has the steps before it in its books.
            self._metrics.flush()
            commit.commit(self.checkpoints, step, attempt, list(files.values()), world_size, extra)
        except (StorageError, OSError) as error:
            self.event("commit_failed", step=step, attempt=attempt, detail=str(error))
            self.say(f"checkpoint of step {step} was not committed: {error}")
            return
        total = sum(part.bytes for part in files.values())
        self.event("committed", step=step, attempt=attempt, bytes=total)
        self.update(last_commit_step=step, last_commit_unix_seconds=time.time())
        settings = self._config.checkpoint
        try:
            removed = commit.prune(self.checkpoints, settings.keep, settings.keep_every)
        except (StorageError, OSError) as error:
            self.event("prune_failed", detail=str(error))
            self.say(f"old checkpoints could not be removed: {error}")
            return
        if removed:
            self.event("pruned", steps=removed)

    def _tell_problem(self, text: str) -> None:
        self.event("problem", detail=text)
        self.say(text)

    def _tell_quarantined(self, extra: dict) -> None:
        """Complete the state of the data that is committed, and report shards that it names for the first time."""
        extra["data_state"]["quarantined"] = sorted(self._quarantined)
        for shard in sorted(self._quarantined - self._told):
            self.event("shard_quarantined", shard=shard)
            self.say(f"shard {shard} is damaged in storage: its samples are masked (data.quarantine_fraction)")
        self._told |= self._quarantined

    def close(self) -> None:
        """Write everything out."""
        for tracker in self._trackers or ():
            tracker.close(self.status["state"])
        self._metrics.close()
        self._events.close()
        self._log.close()


def step_line(record: dict[str, Any], steps: int) -> str:
    """One dense line of progress, e.g. `step 120/300 (40%) loss 4.61 nll 4.13 ... eta 1m12s world 2`."""
    step = record["step"]
    eta = (steps - step) * record["step_seconds"]
    wait = record["data_wait_seconds"] / record["step_seconds"]
    return (
        f"step {step}/{steps} ({step / steps:.0%}) loss {record['loss']:.3f} nll {record['nll']:.3f} "
        f"gnorm {record['grad_norm']:.2f} lr {record['learning_rate']:.2e} tok/s {record['tokens_per_second']:,.0f} "
        f"data {wait:.0%} mem {record['memory_bytes'] / 2**30:.2f}GiB eta {duration(eta)} world {record['world_size']}"
    )


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m07s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
