"""The run's controller: a detached actor that walks codebook -> prepare -> train -> evaluate -> report.

It keeps the run's books and outlives the job's entrypoint (`jobs.run`), which only creates it or attaches to it, prints
what it says and removes it at the end. Where the entrypoint was killed, the controller leaves by itself once the run
has ended. Where the controller's own process was killed, Ray starts it again (max_restarts=-1), on another node if need
be, and it goes on with the run by itself: the books tell it that it had begun, the attempt that was live is fenced by
the number of the next one, and training starts from what the vaults and storage hold.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import yaml

from cluster import commit
from cluster.environment import check_fingerprint
from cluster.gauges import RunGauges
from cluster.storage import Storage
from configs.errors import RunStopped, StorageError, TelarError
from configs.load import parse_config
from configs.schema import RunConfig
from jobs.ledger import STOP_REQUEST, Ledger
from jobs.stages import Stages
from jobs.status_server import serve

HEARTBEAT_SECONDS = 1.0
# Object stores are asked less often: each heartbeat is two requests.
REMOTE_HEARTBEAT_SECONDS = 5.0
# How long a controller whose run has ended waits for its client before it leaves by itself.
FAREWELL_SECONDS = 60.0
OVER = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class Job:
    """What a controller is created for; Ray gives it the same again when it starts the process anew.

    `identity` tells the books of this controller from those of one before, which had another job of the same run.
    """

    stages: tuple[str, ...]
    job_id: str
    dashboard_url: str | None
    identity: str


class Controller:
    """One run. A thread walks the stages from the actor's start on; the methods answer meanwhile."""

    def __init__(self, storage_url: str, run: str, job: Job) -> None:
        self._storage, self._run, self._job = Storage(storage_url), run, job
        self._ledger: Ledger | None = None
        self._gauges: RunGauges | None = None
        self._stages: Stages | None = None
        self._stop_reason: str | None = None
        self._walking = ThreadPoolExecutor(1, thread_name_prefix="stages").submit(self._walk)
        self._walking.add_done_callback(lambda _: self._leave_later())

    def has_ended(self) -> bool:
        """Whether the run is over, so that a new job needs a new controller."""
        return self._walking.done()

    def outcome(self) -> str:
        """Wait for the terminal state: finished, stopped or failed.

        An error that is no TelarError is recorded with its traceback and raised; so is a TelarError before the run's
        books could be opened.
        """
        return self._walking.result()

    def _walk(self) -> str:
        check_fingerprint()
        config, before = read_config(self._storage, self._run), self._before()
        if before is not None and before["state"] in OVER:
            return before["state"]
        ledger = self._ledger = Ledger(self._storage, self._run, config)
        ledger.update(job_id=self._job.job_id, dashboard_url=self._job.dashboard_url, controller=self._job.identity)
        if config.tracking.gauges:
            self._gauges = RunGauges(self._run)
        over = threading.Event()
        heartbeat = threading.Thread(target=self._heartbeat, args=(ledger, over), name="heartbeat", daemon=True)
        heartbeat.start()
        state, message, page = "failed", None, None
        try:
            if before is not None:
                go_on(ledger, before, config.elastic.max_restarts)
            if config.tracking.status_page != "off":
                page = serve(config.tracking.status_page, self._storage, ledger, self._job.job_id)
            me = ray.get_runtime_context().current_actor
            takes_over = before is not None
            self._stages = Stages(config, self._storage, self._run, ledger, me, self.stop_requested, takes_over)
            self._stages.walk(list(self._job.stages))
            state = "finished"
        except RunStopped as stopped:
            state, message = "stopped", str(stopped)
        except TelarError as error:
            message = str(error)
        finally:
            if state == "failed" and message is None:
                message = traceback.format_exc(limit=20)
            over.set()
            heartbeat.join()
            if message:
                ledger.say(f"{state}: {message}")
            ledger.event(f"run_{state}", detail=message)
            ledger.update(state=state, message=message)
            ledger.folder.remove(STOP_REQUEST)
            ledger.close()
            if page is not None:
                page.close()
        return state

    def _before(self) -> dict[str, Any] | None:
        """status.json as this very controller left it when its process died; None at its first start."""
        try:
            status = json.loads(self._storage.read_text(f"{self._run}/status.json"))
        except FileNotFoundError:
            return None
        return status if status.get("controller") == self._job.identity else None

    def _heartbeat(self, ledger: Ledger, over: threading.Event) -> None:
        """Renew the lease in storage and hear stop requests that were left there; storage may fail for a while."""
        seconds = HEARTBEAT_SECONDS if self._storage.is_local else REMOTE_HEARTBEAT_SECONDS
        while not over.wait(seconds):
            try:
                ledger.write_status()
                asked = ledger.folder.exists(STOP_REQUEST)
            except (StorageError, OSError) as error:
                logging.warning("heartbeat of run %s: %s", self._run, error)
                continue
            if asked and self._stop_reason is None:
                self.stop("telar stop")

    def _leave_later(self) -> None:
        """End this actor in a while: nobody may be left to remove it."""
        # Were its process only to exit, Ray would start it again.
        timer = threading.Timer(FAREWELL_SECONDS, ray.kill, [ray.get_runtime_context().current_actor])
        timer.daemon = True
        timer.start()

    def stop(self, reason: str) -> None:
        """Commit, then end the run as stopped."""
        self._stop_reason = reason
        if self._ledger is not None:
            self._ledger.event("stop_requested", detail=reason)
            self._ledger.say(f"stop requested ({reason}); committing")
        if self._stages is not None:
            self._stages.stop()
        try:
            # Here the request survives this process.
            self._storage.create(f"{self._run}/{STOP_REQUEST}", reason.encode())
        except (StorageError, OSError) as error:
            logging.warning("stop request of run %s: %s", self._run, error)

    def stop_requested(self) -> bool:
        """Whether someone asked for a stop."""
        return self._stop_reason is not None

    def lines(self, after: int) -> list[str]:
        """Lines said after the first `after` ones."""
        return self._ledger.lines(after) if self._ledger is not None else []

    # One thread, but Ray may hand over the calls of an actor with several in another order than they were made in.
    @ray.method(concurrency_group="steps")
    def record_steps(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """Steps of rank 0, some of them sent before; the last one that is known here, and that storage has."""
        if self._ledger is None:
            return 0, 0
        for record in records:
            fresh = self._ledger.record_step(record)
            if fresh and self._gauges is not None:
                self._gauges.publish(record | self._ledger.last_commit())
        return self._ledger.steps_known(records[-1]["attempt"])

    def record_rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """A rank's part of a checkpoint lies in storage; one of an attempt that is over changes nothing."""
        if self._ledger is not None:
            self._ledger.record_rank_file(step, attempt, file, world_size, extra)

    def record_problem(self, text: str) -> None:
        """A rank could not do something that the run goes on without."""
        if self._ledger is not None:
            self._ledger.event("problem", detail=text)
            self._ledger.say(text)


def go_on(ledger: Ledger, before: Mapping[str, Any], max_restarts: int) -> None:
    """Write down that the controller's process was started again, and from where; `before` is its last status.

    Raises TelarError when it died more often than `max_restarts` times in a row without a step done in between.
    """
    last = before.get("controller_restarts") or {"count": 0, "step": -1}
    count = 1 if before["step"] > last["step"] else last["count"] + 1
    silent = round(time.time() - before["updated_unix"], 3)
    ledger.event("controller_restarted", restart=count, step=before["step"], silent_seconds=silent)
    ledger.say(f"the controller's process died and was started again; its last sign of life is {silent:.1f} s old")
    kept = {name: before[name] for name in ("started_unix", "device") if name in before}
    ledger.update(**kept, controller_restarts={"count": count, "step": before["step"]})
    if count > max_restarts:
        raise TelarError(
            f"the controller died {count} times in a row at step {before['step']} (elastic.max_restarts allows "
            f"{max_restarts}); the logs of its Ray workers say why"
        )


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
