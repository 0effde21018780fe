"""What a screen shows of a run: a pure function from the run's files, and the time, to figures and sentences.

`telar watch` and the status page draw the same view.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jobs.ledger import duration
from jobs.report_data import course

TERMINAL = {"finished": 0, "failed": 1, "stopped": 3}
LEASE_SECONDS = 20.0
# Figures of pace are taken over so many of the last steps.
RECENT_STEPS = 50
# Events that only repeat what others say, or that are too long for a line.
QUIET = {"decision", "cleared", "ranks_started", "stack", "stage_started", "stage_skipped", "pruned"}


@dataclass(frozen=True)
class AttemptView:
    """One attempt: ranks, the step it started from and why; how it ended, None while it goes on."""

    number: int
    world_size: int
    from_step: int
    started_unix: float
    reason: str
    ended: str | None


@dataclass(frozen=True)
class EventView:
    """One event in a line of words."""

    unix_seconds: float
    text: str
    is_trouble: bool


@dataclass(frozen=True)
class RunView:
    """All that is shown. Shares are in [0, 1], times in seconds; what is not known yet is None."""

    run: str
    state: str
    stage: str | None
    message: str | None
    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    eta_seconds: float | None
    data_wait_share: float | None
    world_size: int
    slowest_rank: str | None
    last_commit_step: int | None
    last_commit_age_seconds: float | None
    silent_seconds: float | None
    running_seconds: float
    records: tuple[Mapping[str, Any], ...]
    restarts: tuple[Mapping[str, Any], ...]
    attempts: tuple[AttemptView, ...]
    commits: tuple[Mapping[str, Any], ...]
    events: tuple[EventView, ...]
    dashboard_url: str | None
    status_page_url: str | None

    @property
    def is_over(self) -> bool:
        """Whether the run has come to an end."""
        return self.state in TERMINAL

    @property
    def failures(self) -> int:
        """How many attempts failed."""
        return sum(event.text.startswith("attempt failed") for event in self.events)


def state_of(status: Mapping[str, Any] | None, now: float) -> str:
    """`submitted` before the controller wrote anything, `silent` when its lease ran out, else the status' own state."""
    if status is None:
        return "submitted"
    if status["state"] not in TERMINAL and now - status["updated_unix"] > LEASE_SECONDS:
        return "silent"
    return status["state"]


def view(
    run: str,
    status: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    now: float,
) -> RunView:
    """What is known of a run at the time `now` (Unix seconds), from status.json, metrics.jsonl and events.jsonl."""
    known = status or {}
    state = state_of(status, now)
    kept, restarts = course([dict(record) for record in records])
    recent = kept[-RECENT_STEPS:]
    pace = median(record["step_seconds"] for record in recent) if recent else None
    spent = sum(record["step_seconds"] for record in recent)
    step, steps = known.get("step") or 0, known.get("steps") or 0
    trains = state == "training" and pace is not None
    updated = known.get("updated_unix", now)
    committed_at = known.get("last_commit_unix_seconds") or max(
        (event["unix_seconds"] for event in events if event["event"] == "committed"), default=None
    )
    return RunView(
        run=run,
        state=state,
        stage=known.get("stage"),
        message=known.get("message"),
        step=step,
        steps=steps,
        tokens=known.get("tokens") or 0,
        loss=known.get("loss"),
        tokens_per_second=known.get("tokens_per_second"),
        step_seconds=pace,
        eta_seconds=(steps - step) * pace if trains else None,
        data_wait_share=sum(record["data_wait_seconds"] for record in recent) / spent if spent else None,
        world_size=known.get("world_size") or 0,
        slowest_rank=_slowest(known.get("slowest_rank"), pace),
        last_commit_step=known.get("last_commit_step"),
        last_commit_age_seconds=None if committed_at is None else max(0.0, now - committed_at),
        silent_seconds=now - updated if state == "silent" else None,
        running_seconds=(updated if state in TERMINAL else now) - known.get("started_unix", now),
        records=tuple(kept),
        restarts=tuple(restarts),
        attempts=_attempts(events, state),
        commits=tuple(event for event in events if event["event"] == "committed"),
        events=tuple(
            EventView(event["unix_seconds"], event_text(event), is_trouble(event))
            for event in events
            if event["event"] not in QUIET
        ),
        dashboard_url=known.get("dashboard_url"),
        status_page_url=known.get("status_page_url"),
    )


def progress_line(shown: RunView) -> str:
    """One dense line for output that is no terminal."""
    words = [shown.run, shown.state]
    if shown.silent_seconds is not None:
        words[-1] += f" for {duration(shown.silent_seconds)}"
    if shown.stage and shown.stage != "train" and not shown.is_over:
        words.append(shown.stage)
    if shown.steps:
        words.append(f"step {shown.step:,}/{shown.steps:,} ({shown.step / shown.steps:.0%})")
    if shown.loss is not None:
        words.append(f"loss {shown.loss:.3f}")
    if shown.tokens_per_second and not shown.is_over:
        words.append(f"tok/s {shown.tokens_per_second:,.0f}")
    if shown.data_wait_share is not None and not shown.is_over:
        words.append(f"data {shown.data_wait_share:.0%}")
    if shown.attempts:
        words.append(f"attempt {shown.attempts[-1].number} world {shown.world_size}")
    if shown.last_commit_step is not None:
        words.append(f"commit {shown.last_commit_step:,}")
    if shown.eta_seconds is not None:
        words.append(f"eta {duration(shown.eta_seconds)}")
    return "  ".join(words) + (f"  {first_line(shown.message)}" if shown.message else "")


def is_trouble(event: Mapping[str, Any]) -> bool:
    """Whether an event tells that something went wrong."""
    name = event["event"]
    return name.endswith(("failed", "damaged", "quarantined")) or name == "problem"


def event_text(event: Mapping[str, Any]) -> str:
    """An event in a line of words: its name, what it is about, and its detail's first line."""
    words = [event["event"].replace("_", " ")]
    for key, value in event.items():
        if key in ("unix_seconds", "event") or value in (None, [], ""):
            continue
        if key in ("detail", "reason", "stage"):
            words.append(first_line(str(value)))
        elif key == "bytes":
            words.append(f"{value / 2**20:.1f} MiB")
        elif key.endswith("seconds"):
            words.append(f"{key.removesuffix('_seconds').replace('_', ' ')} {duration(value)}".replace("seconds ", ""))
        elif isinstance(value, int | float | str):
            words.append(f"{key.replace('_', ' ')} {first_line(str(value))}")
    return "  ".join(words)


def first_line(text: str) -> str:
    """The first line of a text that is not empty, without what would steer a terminal."""
    lines = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
    return next((line for line in lines if line), "")


def _slowest(found: Mapping[str, Any] | None, pace: float | None) -> str | None:
    """The rank that waits longest for data, and for what share of a step."""
    if found is None or not pace:
        return None
    return f"rank {found['rank']} (data {min(1.0, found['data_wait_seconds'] / pace):.0%})"


def _attempts(events: Sequence[Mapping[str, Any]], state: str) -> tuple[AttemptView, ...]:
    """Attempts from their events. One that neither failed nor is the last one ended for the next one's reason."""
    started = [event for event in events if event["event"] == "attempt_started"]
    failed = {event.get("attempt"): event for event in events if event["event"] == "attempt_failed"}
    found = []
    for event, following in itertools.zip_longest(started, started[1:]):
        number = event["attempt"]
        ended = None
        if number in failed:
            ended = first_line(str(failed[number].get("detail") or "failed"))
        elif following is not None:
            ended = first_line(str(following.get("reason") or "resumed"))
        elif state in TERMINAL:
            ended = state
        found.append(
            AttemptView(
                number=number,
                world_size=event.get("world_size") or 0,
                from_step=event.get("from_step") or 0,
                started_unix=event["unix_seconds"],
                reason=first_line(str(event.get("reason") or "")),
                ended=ended,
            )
        )
    return tuple(found)
