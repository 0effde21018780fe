"""The run's controller: a detached actor that walks prepare -> train -> evaluate -> report and keeps the run's books.

It outlives the job's entrypoint (`jobs.run`), which only starts it, attaches to it, prints what it says and removes
it at the end. Where the entrypoint was killed, the controller leaves by itself once the run has ended.
"""

from __future__ import annotations

import os
import threading
import traceback
from typing import Any

import ray
import yaml

from cluster import commit
from cluster.environment import check_fingerprint
from cluster.gauges import RunGauges
from cluster.storage import Storage
from configs.errors import RunStopped, TelarError
from configs.load import parse_config
from configs.schema import RunConfig
from jobs.ledger import Ledger
from jobs.stages import Stages

STOP_REQUEST = "stop-requested"
HEARTBEAT_SECONDS = 1.0
# Object stores are asked less often: each heartbeat is two requests.
REMOTE_HEARTBEAT_SECONDS = 5.0
# How long an ended controller waits to be read and removed by its client before it leaves by itself.
FAREWELL_SECONDS = 60.0


class Controller:
    """One run. `execute` walks the stages in one thread of the actor; the other methods answer meanwhile."""

    def __init__(self, storage_url: str, run: str, job_id: str, dashboard_url: str | None) -> None:
        check_fingerprint()
        self._storage, self._run = Storage(storage_url), run
        self._config = read_config(self._storage, run)
        self._ledger = Ledger(self._storage, run, self._config)
        self._ledger.update(job_id=job_id, dashboard_url=dashboard_url)
        self._gauges = RunGauges(run) if self._config.tracking.gauges else None
        self._stop_reason: str | None = None
        self._stages: Stages | None = None
        self._started = threading.Event()
        self._ended = threading.Event()

    def execute(self, names: list[str]) -> str:
        """Walk the named stages and return the terminal state: finished, stopped or failed.

        An error that is no TelarError is recorded with its traceback and raised.
        """
        if self._started.is_set():
            self._ended.wait()
            return self._ledger.status["state"]
        self._started.set()
        heartbeat = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        heartbeat.start()
        state, message = "failed", None
        try:
            me = ray.get_runtime_context().current_actor
            self._stages = Stages(self._config, self._storage, self._run, self._ledger, me, self.stop_requested)
            self._stages.walk(names)
            state = "finished"
        except RunStopped as stopped:
            state, message = "stopped", str(stopped)
        except TelarError as error:
            message = str(error)
        finally:
            if state == "failed" and message is None:
                message = traceback.format_exc(limit=20)
            self._ledger.event(f"run_{state}", detail=message)
            if message:
                self._ledger.say(f"{state}: {message}")
            self._ended.set()
            heartbeat.join()
            self._ledger.update(state=state, message=message)
            self._ledger.close()
            leave = threading.Timer(FAREWELL_SECONDS, os._exit, [0])
            leave.daemon = True
            leave.start()
        return state

    def _heartbeat(self) -> None:
        """Renew the lease in storage and hear stop requests that were left there."""
        seconds = HEARTBEAT_SECONDS if self._storage.is_local else REMOTE_HEARTBEAT_SECONDS
        while not self._ended.wait(seconds):
            self._ledger.write_status()
            if self._stop_reason is None and self._ledger.folder.exists(STOP_REQUEST):
                self.stop("telar stop")

    def stop(self, reason: str) -> None:
        """Commit, then end the run as stopped."""
        self._stop_reason = reason
        self._ledger.event("stop_requested", detail=reason)
        self._ledger.say(f"stop requested ({reason}); committing")
        if self._stages is not None:
            self._stages.stop()

    def stop_requested(self) -> bool:
        """Whether someone asked for a stop."""
        return self._stop_reason is not None

    def status(self) -> dict[str, Any]:
        """The content of status.json."""
        return dict(self._ledger.status)

    def lines(self, after: int) -> tuple[list[str], bool]:
        """Lines said after the first `after` ones, and whether the run has ended."""
        ended = self._ended.is_set()
        return self._ledger.lines(after), ended

    def record_step(self, record: dict[str, Any]) -> None:
        """A step of rank 0."""
        self._ledger.record_step(record)
        if self._gauges is not None:
            self._gauges.publish(record)

    def record_rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """A rank's part of a checkpoint lies in storage."""
        self._ledger.record_rank_file(step, attempt, file, world_size, extra)


def read_config(storage: Storage, run: str) -> RunConfig:
    """The resolved configuration of a run; raises TelarError when this node does not see it."""
    try:
        text = storage.read_text(f"{run}/config.yaml")
    except FileNotFoundError as error:
        raise TelarError(
            f"{storage.url}/{run}/config.yaml is not visible on node {ray.util.get_node_ip_address()}: storage must "
            "be the same on every node; use an object store or a shared folder (cluster.shared_filesystem: true)"
        ) from error
    return parse_config(yaml.safe_load(text), f"{run}/config.yaml")


def create_or_attach(storage_url: str, run: str, job_id: str, dashboard_url: str | None) -> Any:
    """The run's controller actor, created detached where there is none."""
    return (
        ray.remote(Controller)
        .options(
            name=f"{run}/controller",
            namespace="telar",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=16,
        )
        .remote(storage_url, run, job_id, dashboard_url)
    )
