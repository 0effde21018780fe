"""How a client comes to a run's controller: the actor that works on the run already, else a new one.

It is detached and Ray starts its process again whenever that is lost (max_restarts=-1), so neither a client's end nor
its own process's ends the run.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.errors import TelarError
from jobs.controller import Controller, Job

# Ray starts the process again within seconds where there is a node for it.
RESTART_SECONDS = 120.0
RETRY_SECONDS = 0.5


def create_or_attach(
    storage_url: str, run: str, stages: Sequence[str], job_id: str, dashboard_url: str | None
) -> ray.actor.ActorHandle:
    """The run's controller actor: the one that works on it, else a new detached one, which begins with the stages."""
    while True:
        actor = (
            ray.remote(concurrency_groups={"steps": 1})(Controller)
            .options(
                name=f"{run}/controller",
                namespace="telar",
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
                # One byte: Ray puts actors that take nothing on any node, whatever a soft strategy says.
                memory=1,
                max_concurrency=16,
                # With the job's entrypoint, which Ray starts on the head: no worker node's loss takes it along.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
            )
            .remote(storage_url, run, Job(tuple(stages), job_id, dashboard_url, uuid.uuid4().hex))
        )
        ended = answer(actor, "has_ended")
        if ended is False:
            return actor
        if ended:
            ray.kill(actor)
        # Its name is free for a new one.


def answer(actor: ray.actor.ActorHandle, method: str) -> Any:
    """What the controller answers, once Ray has started its process again if that is gone; None if it is gone itself.

    Raises TelarError when there is no process within RESTART_SECONDS.
    """
    deadline = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < deadline:
        try:
            return ray.get(getattr(actor, method).remote())
        except ray.exceptions.ActorUnavailableError:
            time.sleep(RETRY_SECONDS)
        except ray.exceptions.ActorDiedError:
            return None
    raise TelarError(f"the run's controller died, and Ray did not start it again within {RESTART_SECONDS:.0f} s")
