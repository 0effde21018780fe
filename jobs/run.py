"""Entrypoint of a run's Ray job: `python -m jobs.run STORAGE/RUN [--stage NAME]`.

A thin client: it creates or re-attaches to the run's controller, prints what the controller says, and exits with the
run's outcome (0 finished, 1 failed, 3 stopped). SIGTERM asks the controller to commit and stop; any other end of this
process leaves the run going on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading

import ray

from cluster.environment import DASHBOARD_VARIABLE, JOB_ID_VARIABLE, check_fingerprint
from cluster.storage import Storage
from configs.errors import TelarError
from configs.redaction import redacted
from jobs.attach import answer, create_or_attach
from jobs.stages import STAGES

POLL_SECONDS = 0.5
EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 3}


def main() -> int:
    """Parse, attach, stream, tell the outcome."""
    parser = argparse.ArgumentParser(prog="python -m jobs.run")
    parser.add_argument("url", help="STORAGE/RUN, the folder that holds config.yaml")
    parser.add_argument("--stage", choices=STAGES, help="run this stage only")
    arguments = parser.parse_args()
    storage_url, run = arguments.url.rstrip("/").rsplit("/", 1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    check_fingerprint()
    ray.init(namespace="telar", log_to_driver=False, logging_level="warning")
    # ray.init puts a handler of its own in place, which exits at once.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    job_id = os.environ.get(JOB_ID_VARIABLE, ray.get_runtime_context().get_job_id())
    stages = [arguments.stage] if arguments.stage else list(STAGES)
    controller = create_or_attach(storage_url, run, stages, job_id, os.environ.get(DASHBOARD_VARIABLE))
    state = None
    while state is None and answer(controller, "has_ended") is not None:
        # Once more for each time that Ray had to start the controller's process anew.
        state = follow(controller, stop)
    if state is None:
        # Another client of the same run saw the end first and removed the controller; or it died for good.
        state = recorded_state(Storage(storage_url), run)
    else:
        ray.kill(controller)
    return EXIT_CODES[state]


def follow(controller: ray.actor.ActorHandle, stop: threading.Event) -> str | None:
    """Print the controller's lines until the outcome is there; pass a stop on once.

    Returns the terminal state, None when the controller's process died before it.
    """
    outcome, printed, told = controller.outcome.remote(), 0, False
    while True:
        done, _ = ray.wait([outcome], timeout=POLL_SECONDS)
        try:
            if stop.is_set() and not told:
                ray.get(controller.stop.remote("SIGTERM to the job's entrypoint"))
                told = True
            lines = ray.get(controller.lines.remote(printed))
            printed += len(lines)
            for line in lines:
                print(line, flush=True)
            if done:
                return ray.get(outcome)
        except ray.exceptions.RayTaskError as error:
            print(redacted(f"error: {error.cause if isinstance(error.cause, TelarError) else error}"), flush=True)
            return "failed"
        except ray.exceptions.RayActorError:
            return None


def recorded_state(storage: Storage, run: str) -> str:
    """The terminal state in status.json; raises TelarError when the run is in none."""
    state = json.loads(storage.read_text(f"{run}/status.json"))["state"]
    if state not in EXIT_CODES:
        raise TelarError(f"the controller of run {run} died while {state}; continue with `telar submit --resume {run}`")
    return state


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TelarError as error:
        print(redacted(f"error: {error}"), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
