"""The run's controller: a detached actor that walks codebook -> prepare -> train -> evaluate -> report.

It keeps the run's books and outlives the job's entrypoint (`jobs.run`), which only starts it, attaches to it, prints
what it says and removes it at the end. Where the entrypoint was killed, the controller leaves by itself once the run
has ended.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import commit
from cluster.environment import check_fingerprint
from cluster.gauges import RunGauges
from cluster.storage import Storage
from configs.errors import RunStopped, StorageError, TelarError
from configs.load import parse_config
from configs.schema import RunConfig
from jobs.in_order import InOrder
from jobs.ledger import STOP_REQUEST, Ledger
from jobs.stages import Stages
from jobs.status_server import serve

HEARTBEAT_SECONDS = 1.0
# Object stores are asked less often: each heartbeat is two requests.
REMOTE_HEARTBEAT_SECONDS = 5.0
# How long a controller that has nothing to do waits for a client before it leaves by itself.
FAREWELL_SECONDS = 60.0


class Controller:
    """One run. `execute` walks the stages in one thread of the actor; the other methods answer meanwhile."""

    def __init__(self, storage_url: str, run: str) -> None:
        self._storage, self._run = Storage(storage_url), run
        self._ledger: Ledger | None = None
        self._gauges: RunGauges | None = None
        self._steps: InOrder[dict[str, Any]] = InOrder()
        self._stages: Stages | None = None
        self._stop_reason: str | None = None
        self._claim = threading.Lock()
        self._started = False
        self._ended = threading.Event()
        self._leave_later()

    def has_ended(self) -> bool:
        """Whether the run is over, so that a new job needs a new controller."""
        return self._ended.is_set()

    def execute(self, names: list[str], job_id: str, dashboard_url: str | None) -> str:
        """Walk the named stages and return the terminal state: finished, stopped or failed.

        A second caller waits for the first one's outcome. An error that is no TelarError is recorded with its
        traceback and raised; so is a TelarError before the run's books could be opened.
        """
        with self._claim:
            first, self._started = not self._started, True
        if not first:
            self._ended.wait()
            return self._ledger.status["state"] if self._ledger is not None else "failed"
        try:
            check_fingerprint()
            return self._walk(names, job_id, dashboard_url)
        finally:
            self._ended.set()
            self._leave_later()

    def _walk(self, names: list[str], job_id: str, dashboard_url: str | None) -> str:
        config = read_config(self._storage, self._run)
        ledger = self._ledger = Ledger(self._storage, self._run, config)
        ledger.update(job_id=job_id, dashboard_url=dashboard_url)
        if config.tracking.gauges:
            self._gauges = RunGauges(self._run)
        over = threading.Event()
        heartbeat = threading.Thread(target=self._heartbeat, args=(ledger, over), name="heartbeat", daemon=True)
        heartbeat.start()
        state, message, page = "failed", None, None
        try:
            if config.tracking.status_page != "off":
                page = serve(config.tracking.status_page, self._storage, ledger, job_id)
            me = ray.get_runtime_context().current_actor
            self._stages = Stages(config, self._storage, self._run, ledger, me, self.stop_requested)
            self._stages.walk(names)
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
            for record in self._steps.rest():
                ledger.record_step(record)
            if message:
                ledger.say(f"{state}: {message}")
            ledger.event(f"run_{state}", detail=message)
            ledger.update(state=state, message=message)
            ledger.close()
            if page is not None:
                page.close()
        return state

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
        """End this process in a while, unless it is walking the stages then: nobody may be left to remove it."""

        def leave() -> None:
            if self._ended.is_set() or not self._started:
                os._exit(0)

        timer = threading.Timer(FAREWELL_SECONDS, leave)
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

    def stop_requested(self) -> bool:
        """Whether someone asked for a stop."""
        return self._stop_reason is not None

    def lines(self, after: int) -> list[str]:
        """Lines said after the first `after` ones."""
        return self._ledger.lines(after) if self._ledger is not None else []

    # One thread, but Ray may hand over the calls of an actor with several in another order than they were made in.
    @ray.method(concurrency_group="steps")
    def record_step(self, record: dict[str, Any], number: int) -> None:
        """A step of rank 0; `number` counts its messages in an attempt."""
        if self._ledger is None:
            return
        for each in self._steps.put(record["attempt"], number, record):
            self._ledger.record_step(each)
            if self._gauges is not None:
                self._gauges.publish(each | self._ledger.last_commit())

    def record_rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """A rank's part of a checkpoint lies in storage."""
        assert self._ledger is not None
        self._ledger.record_rank_file(step, attempt, file, world_size, extra)

    def record_problem(self, text: str) -> None:
        """A rank could not do something that the run goes on without."""
        assert self._ledger is not None
        self._ledger.event("problem", detail=text)
        self._ledger.say(text)


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


def create_or_attach(storage_url: str, run: str) -> Any:
    """The run's controller actor: the one that works on it, else a new detached one."""
    name = f"{run}/controller"
    while True:
        actor = (
            ray.remote(concurrency_groups={"steps": 1})(Controller)
            .options(
                name=name,
                namespace="telar",
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=16,
                # With the job's entrypoint, which Ray starts on the head: no worker node's loss takes it along.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
            )
            .remote(storage_url, run)
        )
        try:
            if not ray.get(actor.has_ended.remote()):
                return actor
            ray.kill(actor)
        except ray.exceptions.RayActorError:
            # It ended, or left by itself, between our two calls; its name is free for a new one.
            continue
