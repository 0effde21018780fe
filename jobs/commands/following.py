"""Following, watching and stopping a run, and its logs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.storage import Storage
from configs.errors import ConfigError, TelarError, UnreachableError
from jobs.commands.addresses import connect_to_run
from jobs.commands.runs import TERMINAL, RunPlace, state_of
from jobs.ledger import STOP_REQUEST
from jobs.run_reader import RunReader
from jobs.run_view import progress_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from jobs.submit import Jobs

POLL_SECONDS = 1.0
RECORD_SECONDS = 30.0
INTERRUPTED = 130


def follow_job(jobs: Jobs, place: RunPlace, job_id: str, write: Callable[[str], None]) -> int:
    """Pass on the job's lines to its end, write RUN/job.json and return the outcome's exit code.

    Ctrl-C leaves the job running, says how to follow it again and returns 130.
    """
    from jobs.submit import exit_code, record

    try:
        details = jobs.follow(job_id, write)
    except KeyboardInterrupt:
        print(_interrupted(place), file=sys.stderr)
        return INTERRUPTED
    record(place.storage, place.name, details)
    code = exit_code(details)
    if code == 1:
        status = place.status()
        said = (details.message or "see its log").partition(", last available logs")[0]
        reason = (status or {}).get("message") or said
        print(f"error: run {place.name} failed: {reason}", file=sys.stderr)
    return code


def job_logs(place: RunPlace, address: str | None, follow: bool, write: Callable[[str], None]) -> int:
    """Print what the run's newest job has printed, and follow it if asked to."""
    try:
        jobs = connect_to_run(place, address)
        details = _job_of(jobs, place)
    except TelarError:
        # The cluster is gone, or has forgotten the job; storage keeps what the run said.
        if state_of(place.status()) not in TERMINAL or not place.storage.exists(f"{place.name}/logs/job.log"):
            raise
        write(place.storage.read_text(f"{place.name}/logs/job.log"))
        return 0
    if follow:
        return follow_job(jobs, place, details.submission_id, write)
    write(jobs.logs(details.submission_id))
    return 0


def rank_logs(place: RunPlace, rank: int, follow: bool, write: Callable[[str], None]) -> int:
    """Print one rank's log from storage, and follow it until the run ends if asked to."""
    path, written = f"{place.name}/logs/rank-{rank:05d}.log", 0
    if not follow and not place.storage.exists(path):
        known = place.storage.names(f"{place.name}/logs")
        raise ConfigError(
            f"--rank: {rank} has written no log in {place.url}/logs; there are: {', '.join(known) or 'none'}"
        )
    try:
        while True:
            ended = not follow or state_of(place.status()) in TERMINAL
            if place.storage.exists(path):
                fresh = _read_from(place.storage, path, written)
                written += len(fresh)
                write(fresh.decode(errors="replace"))
            if ended:
                return 0
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(_interrupted(place), file=sys.stderr)
        return INTERRUPTED


def watch(place: RunPlace, address: str | None, live: bool, show: Callable[[str], None]) -> int:
    """Show the run's state until it ends; returns the outcome's exit code.

    On a terminal one screen is kept up to date, else a line is printed at every change of state or step, and for every
    event that tells of trouble.
    """
    reader = RunReader(place.storage, place.name)
    try:
        if live:
            return _watch_live(place, reader, address)
        said, told = None, 0.0
        while True:
            shown = reader.look(time.time())
            for event in shown.events:
                if event.is_trouble and event.unix_seconds > told:
                    told = event.unix_seconds
                    show(f"{shown.run}  {event.text}")
            key = (shown.state, shown.stage, shown.step)
            if key != said:
                show(progress_line(shown))
                said = key
            code = _outcome(place, address)
            if code is not None:
                return code
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(_interrupted(place), file=sys.stderr)
        return INTERRUPTED


def _watch_live(place: RunPlace, reader: RunReader, address: str | None) -> int:
    from rich.console import Console
    from rich.live import Live

    from jobs.commands.screen import screen

    console = Console()
    with Live(console=console, auto_refresh=False) as display:
        while True:
            display.update(screen(reader.look(time.time()), console.width, console.height), refresh=True)
            code = _outcome(place, address)
            if code is not None:
                # The last state that was drawn may be of before the end.
                display.update(screen(reader.look(time.time()), console.width, console.height), refresh=True)
                return code
            time.sleep(POLL_SECONDS)


def _outcome(place: RunPlace, address: str | None) -> int | None:
    """Exit code of a run that has ended, None while it goes on.

    A run whose controller has not spoken yet, or no longer speaks, may have a job that ended: the job is asked then.
    """
    state = state_of(place.status())
    if state in TERMINAL:
        _keep_record(place, address)
        return TERMINAL[state]
    if state not in ("silent", "submitted"):
        return None
    details = _job_of(connect_to_run(place, address), place)
    state = state_of(place.status())
    if not details.status.is_terminal() or state not in ("silent", "submitted"):
        return None
    from jobs.submit import record

    record(place.storage, place.name, details)
    raise TelarError(
        f"run {place.name} ended without a word: its job is {details.status.value} ({details.message}); continue it "
        f"with `telar submit --resume {place.name}`"
    )


def _lacks_record(place: RunPlace) -> bool:
    """Whether job.json is absent or tells of another job than status.json."""
    try:
        kept = json.loads(place.storage.read_text(f"{place.name}/job.json"))
    except FileNotFoundError:
        return True
    return (place.status() or {}).get("job_id") not in (kept.get("submission_id"), kept.get("job_id"))


def _keep_record(place: RunPlace, address: str | None) -> None:
    """Write RUN/job.json of a run that has just ended, while its cluster still knows the job."""
    from jobs.submit import record

    if not _lacks_record(place):
        return
    try:
        jobs = connect_to_run(place, address)
        record(place.storage, place.name, jobs.wait(_job_of(jobs, place).submission_id, RECORD_SECONDS))
    except TelarError as error:
        print(f"job.json is not written: {error}", file=sys.stderr)


def stop(place: RunPlace, address: str | None, now: bool, timeout_seconds: float, say: Callable[[str], None]) -> str:
    """Stop a run and return the state it ended in.

    Without `now` the controller is asked, through storage, to commit a checkpoint first. A job that Ray has not
    started has nothing to commit and is ended directly.
    """
    from jobs.submit import record

    if state_of(place.status()) in TERMINAL:
        return state_of(place.status())
    jobs = connect_to_run(place, address)
    details = _job_of(jobs, place)
    job_id = details.submission_id
    if not details.status.is_terminal():
        if now or details.status.value == "PENDING":
            details = jobs.stop_now(job_id)
        else:
            place.storage.write_text(f"{place.name}/{STOP_REQUEST}", "telar stop")
            say(f"asked run {place.name} to commit a checkpoint and stop")
            try:
                details = jobs.wait(job_id, timeout_seconds)
            except TelarError as error:
                if isinstance(error, UnreachableError):
                    raise
                raise TelarError(
                    f"run {place.name} did not stop within {timeout_seconds:.0f} s; wait longer with --timeout, or "
                    f"end it through Ray, with or without a checkpoint: telar stop {place.name} --now"
                ) from error
    elif state_of(place.status()) not in (*TERMINAL, "silent", "submitted"):
        # The job was killed and its controller goes on: it hears the request in storage.
        place.storage.write_text(f"{place.name}/{STOP_REQUEST}", "telar stop")
        say(f"the job of run {place.name} is gone; asked its controller to commit a checkpoint and stop")
        _wait_for_controller(place, timeout_seconds)
    record(place.storage, place.name, details)
    state = state_of(place.status())
    return state if state in TERMINAL else "stopped" if details.status.value == "STOPPED" else "failed"


def _wait_for_controller(place: RunPlace, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while state_of(place.status()) not in (*TERMINAL, "silent"):
        if time.monotonic() > deadline:
            raise TelarError(
                f"run {place.name} did not stop within {timeout_seconds:.0f} s; wait longer with --timeout"
            )
        time.sleep(POLL_SECONDS)


def _job_of(jobs: Jobs, place: RunPlace) -> JobDetails:
    details = jobs.of_run(place.url)
    if details is None:
        raise TelarError(
            f"the cluster at {jobs.address.url} knows no job of run {place.name}; it has been restarted since, or the "
            f"run belongs to another cluster (--address); `telar submit --resume {place.name}` continues it"
        )
    return details


def _read_from(storage: Storage, path: str, start: int) -> bytes:
    with storage.open(path) as file:
        file.seek(start)
        return file.read()


def _interrupted(place: RunPlace) -> str:
    return (
        f"\nrun {place.name} goes on; follow it again: telar logs -f {place.url}\n"
        f"its state: telar status {place.url}   stop it: telar stop {place.url}"
    )
