"""The attempts of a training run as a pure state machine: (rules, state, event) -> (state, decisions with reasons).

It knows neither Ray nor DeepSpeed nor a clock: events carry their time, decisions are data that `jobs.train_stage`
carries out and writes to events.jsonl. An attempt is a group of replicas that trains from one recoverable step; at most
one is live, from its Start until its Cleared event.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["waiting", "starting", "running", "resizing", "stopping", "clearing", "finished", "stopped", "failed"]
Source = Literal["memory", "storage"]
OVER = ("finished", "stopped", "failed")
LIVE = ("starting", "running", "resizing", "stopping", "clearing")


@dataclass(frozen=True)
class Rules:
    """What a run promises and allows: at most `max_restarts` restarts in a row from the same recoverable step."""

    last_step: int
    min_replicas: int
    max_replicas: int
    max_restarts: int
    wait_seconds: float
    grow_seconds: float


# Events. `at` is in seconds of any one clock; those of an attempt that is not live change nothing.


@dataclass(frozen=True)
class Survey:
    """What the cluster has room for (the live attempt's replicas counted), and the newest recoverable steps.

    `leaving` names nodes of the live attempt that are being drained; there is no room on such nodes.
    """

    at: float
    replicas: int
    committed: int = 0
    memory: int = 0
    leaving: str = ""


@dataclass(frozen=True)
class Launched:
    """The ranks of the attempt were called: their processes are there."""

    at: float
    attempt: int


@dataclass(frozen=True)
class Started:
    """All ranks of the attempt train."""

    at: float
    attempt: int


@dataclass(frozen=True)
class Stepped:
    """The attempt has done the optimizer step."""

    at: float
    attempt: int
    step: int


@dataclass(frozen=True)
class Ended:
    """All ranks have left the loop by themselves after `step`, whose state they handed in to be committed."""

    at: float
    attempt: int
    step: int


@dataclass(frozen=True)
class Failed:
    """The attempt cannot go on.

    `lost`: a process, a node or what it needed is gone, or a rank hangs; `fatal`: it would fail again; `damaged`: what
    it was to start from does not match its digests; `room`: the replicas found no room after all.
    """

    at: float
    attempt: int
    reason: str
    kind: Literal["lost", "fatal", "damaged", "room"] = "lost"


@dataclass(frozen=True)
class Cleared:
    """No process of the attempt is left that could train or write."""

    at: float
    attempt: int


@dataclass(frozen=True)
class StopRequested:
    """Someone asks the run to commit and end."""

    at: float
    reason: str


Event = Survey | Launched | Started | Stepped | Ended | Failed | Cleared | StopRequested


# Decisions.


@dataclass(frozen=True)
class Start:
    """Start an attempt of so many replicas from the state of `step` (0: from the beginning)."""

    attempt: int
    replicas: int
    step: int
    source: Source
    change: Literal["first", "same", "shrink", "grow"]
    reason: str


@dataclass(frozen=True)
class Commit:
    """Ask all ranks to commit the state after the step they are in, and to leave."""

    attempt: int
    reason: str


@dataclass(frozen=True)
class Clear:
    """Make sure that nothing of the attempt trains any more, then say Cleared."""

    attempt: int
    reason: str


@dataclass(frozen=True)
class Discard:
    """Never start from this state again."""

    step: int
    source: Source
    reason: str


@dataclass(frozen=True)
class Preserve:
    """Commit the state of `step`, which lies in memory alone; the next survey says whether that worked."""

    step: int
    reason: str


@dataclass(frozen=True)
class Finish:
    """The last step is committed."""

    reason: str


@dataclass(frozen=True)
class Stop:
    """The run ends on request; the state of `step` is committed."""

    step: int
    reason: str


@dataclass(frozen=True)
class Fail:
    """The run ends with an error."""

    reason: str
    cause: Literal["room", "restarts", "fatal", "uncommitted"]


Decision = Start | Commit | Clear | Discard | Preserve | Finish | Stop | Fail


@dataclass(frozen=True)
class RunState:
    """Where the run stands. `attempt` counts the attempts of this state machine, from 1."""

    phase: Phase = "waiting"
    since: float = 0.0
    attempt: int = 0
    replicas: int = 0
    from_step: int = 0
    source: Source = "storage"
    # Last step heard of from the live attempt.
    step: int = 0
    # Highest step that was ever recoverable, and failures since it was reached.
    best: int = 0
    restarts: int = 0
    # Since when the run has been without an attempt that trains (failed starts included); None while one does.
    idle_since: float | None = 0.0
    # Since when there has been room for more replicas.
    room_since: float | None = None
    stop_reason: str | None = None
    # How the attempt before ended, until a survey says what is recoverable now.
    failure: Failed | None = None
    ended_step: int | None = None
    # Age of the oldest state that was found damaged since the last progress; see `_age`.
    damaged: int | None = None
    # The step in memory that was to be committed between attempts, and how often that was tried.
    preserved: int = 0
    preserves: int = 0
    # Whether the stop was asked for when no attempt could have committed any more.
    stopped_at_rest: bool = False
    why: str = "the run begins"

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.phase in OVER

    @property
    def live(self) -> int | None:
        """The attempt that may have processes, or None."""
        return self.attempt if self.phase in LIVE else None


Outcome = tuple[RunState, list[Decision]]


def begin(at: float, committed: int = 0) -> RunState:
    """A run that has no attempt yet; `committed` is the newest committed step."""
    return RunState(since=at, idle_since=at, best=committed)


def decide(rules: Rules, state: RunState, event: Event) -> Outcome:
    """The state after an event and what to do now, in this order."""
    if state.over:
        return state, []
    if isinstance(event, Survey):
        return _on_survey(rules, state, event)
    if isinstance(event, StopRequested):
        return _on_stop(state, event)
    if event.attempt != state.live:
        return state, []
    if isinstance(event, Launched):
        # Only from now on the ranks are waited for; what came before was preparation of processes.
        waits = state.phase in ("starting", "stopping", "resizing")
        return (replace(state, since=event.at) if waits else state), []
    if isinstance(event, Cleared):
        if state.phase != "clearing":
            return state, []
        return replace(state, phase="waiting", since=event.at, idle_since=_idle(state, event.at)), []
    if state.phase == "clearing":
        return state, []
    if isinstance(event, Failed):
        cleared = _clearing(state, event.at, failure=event, why=f"attempt {state.attempt} failed: {event.reason}")
        return cleared, [Clear(event.attempt, event.reason)]
    trains = replace(state, idle_since=None)
    if state.phase == "starting":
        trains = replace(trains, phase="running", since=event.at)
    if isinstance(event, Started):
        return trains, []
    if isinstance(event, Stepped):
        return replace(trains, step=max(state.step, event.step)), []
    step = max(state.step, event.step)
    return (
        _clearing(replace(trains, step=step), event.at, ended_step=event.step),
        [Clear(event.attempt, f"all ranks left after step {event.step}")],
    )


def _on_stop(state: RunState, event: StopRequested) -> Outcome:
    if state.stop_reason is not None:
        return state, []
    asked = replace(state, stop_reason=event.reason)
    if state.phase in ("starting", "running"):
        return replace(asked, phase="stopping", since=event.at), [Commit(state.attempt, event.reason)]
    if state.phase == "resizing":
        # They were asked to commit and leave already.
        return replace(asked, phase="stopping"), []
    return replace(asked, stopped_at_rest=state.ended_step is None), []


def _on_survey(rules: Rules, state: RunState, event: Survey) -> Outcome:
    if state.phase == "waiting":
        return _next_attempt(rules, state, event)
    waited = event.at - state.since
    never_trained = state.idle_since is not None
    if state.phase in ("starting", "stopping", "resizing") and never_trained and waited > rules.wait_seconds:
        reason = f"not all ranks started within {waited:.0f} s (elastic.start_timeout_seconds)"
        return decide(rules, state, Failed(event.at, state.attempt, reason))
    if event.leaving and state.phase in ("starting", "running") and state.step < rules.last_step:
        reason = f"{event.leaving} is being drained: commit, then go on without it"
        return replace(state, phase="resizing", since=event.at, why=reason), [Commit(state.attempt, reason)]
    if state.phase != "running":
        return state, []
    wanted = min(event.replicas, rules.max_replicas)
    if wanted <= state.replicas:
        return replace(state, room_since=None), []
    since = event.at if state.room_since is None else state.room_since
    state = replace(state, room_since=since)
    # Only an attempt that got somewhere is given up for a larger one, and not for room that comes and goes.
    settled = event.at - max(since, state.since) >= rules.grow_seconds
    if not settled or state.step <= state.from_step or state.step >= rules.last_step:
        return state, []
    reason = f"room for {wanted} replicas instead of {state.replicas} for {event.at - since:.1f} s: commit, then grow"
    return replace(state, phase="resizing", since=event.at, why=reason), [Commit(state.attempt, reason)]


def _next_attempt(rules: Rules, state: RunState, event: Survey) -> Outcome:
    """No attempt is live: end the run, start the next attempt, or wait for room."""
    recoverable = max(event.committed, event.memory)
    source: Source = "memory" if event.memory > event.committed else "storage"
    progress = recoverable > state.best
    if progress:
        state = replace(state, best=recoverable, restarts=0, damaged=None)
    failure, ended = state.failure, state.ended_step
    state = replace(state, failure=None, ended_step=None)
    if failure is not None and failure.kind == "fatal":
        return _over(state, "failed", Fail(failure.reason, "fatal"))
    if event.committed >= rules.last_step:
        return _over(state, "finished", Finish(f"step {event.committed} is committed"))
    if failure is not None and failure.kind == "damaged" and state.from_step > 0:
        discard = Discard(state.from_step, state.source, failure.reason)
        age = _age(state.from_step, state.source)
        older = state.damaged is None or age < state.damaged
        if not older and state.restarts >= rules.max_restarts:
            return _over(state, "failed", Fail(_used_up(rules, state, failure.reason), "restarts"))
        # This survey may still count what is discarded: the next one decides.
        return replace(state, damaged=age, restarts=state.restarts + (not older)), [discard]
    lost = failure is not None and failure.kind != "room"
    unfinished = ended is not None and event.committed < ended
    used_up = (lost or unfinished) and state.restarts >= rules.max_restarts
    short = event.replicas < rules.min_replicas or (failure is not None and failure.kind == "room")
    if (state.stop_reason is not None or used_up or short) and event.memory > event.committed:
        again = state.preserves if state.preserved == event.memory else 0
        if again <= rules.max_restarts:
            # The run will rest, and memory is lost with the next node: what lies there alone goes to storage first.
            tried = replace(state, preserved=event.memory, preserves=again + 1, failure=failure, ended_step=ended)
            reason = failure.reason if failure is not None else state.why
            why = state.stop_reason or (reason if used_up else f"room for {event.replicas} replicas")
            return tried, [Preserve(event.memory, f"{why}; step {event.memory} is in memory alone")]
    if state.stop_reason is not None and ended is None and event.committed >= recoverable:
        # What was lost after the commit is not missed any more; or nothing could have been committed that is newer.
        known = event.committed >= max(state.step, 1) or 0 < event.committed == state.preserved
        if known or state.stopped_at_rest:
            return _over(state, "stopped", Stop(event.committed, state.stop_reason))
    uncommitted = ended is not None and not progress and (unfinished or ended <= state.from_step)
    if uncommitted or lost:
        reason = failure.reason if failure is not None else _uncommitted(ended, event.committed)
        if state.stop_reason is not None:
            return _over(state, "failed", Fail(reason, "fatal" if failure is not None else "uncommitted"))
        if used_up or state.restarts >= rules.max_restarts:
            return _over(state, "failed", Fail(_used_up(rules, state, reason), "restarts"))
        state = replace(state, restarts=state.restarts + 1, why=state.why if failure is not None else reason)
    if state.stop_reason is not None:
        reached = max(recoverable, ended or 0)
        if event.committed < reached:
            return _over(state, "failed", Fail(_uncommitted(reached, event.committed), "uncommitted"))
        return _over(state, "stopped", Stop(event.committed, state.stop_reason))
    replicas = min(event.replicas, rules.max_replicas)
    if failure is not None and failure.kind == "room":
        # What was counted could not be reserved: with fewer the run goes on, and grows again later.
        replicas = min(replicas, max(rules.min_replicas, state.replicas - 1))
    waited = event.at - (state.since if state.idle_since is None else state.idle_since)
    if short and waited > rules.wait_seconds:
        text = f"room for {event.replicas} replicas, {rules.min_replicas} are needed, for {waited:.0f} s"
        return _over(state, "failed", Fail(text, "room"))
    if replicas < rules.min_replicas:
        return state, []
    start = Start(
        state.attempt + 1, replicas, recoverable, source, _change(state, replicas), _why(rules, state, replicas)
    )
    started = RunState(
        phase="starting",
        since=event.at,
        attempt=start.attempt,
        replicas=replicas,
        from_step=recoverable,
        source=source,
        step=recoverable,
        best=state.best,
        restarts=state.restarts,
        idle_since=state.idle_since,
        damaged=state.damaged,
    )
    return started, [start]


def _change(state: RunState, replicas: int) -> Literal["first", "same", "shrink", "grow"]:
    if state.attempt == 0:
        return "first"
    return "same" if replicas == state.replicas else "shrink" if replicas < state.replicas else "grow"


def _why(rules: Rules, state: RunState, replicas: int) -> str:
    sized = f"{replicas} replicas fit"
    if replicas == rules.max_replicas:
        sized = f"{replicas} replicas are the most that elastic.max_replicas allows"
    counted = f"; restart {state.restarts} of {rules.max_restarts} without progress" if state.restarts else ""
    return f"{state.why}; {sized}{counted}"


def _used_up(rules: Rules, state: RunState, reason: str) -> str:
    return f"{reason}; {state.restarts} of {rules.max_restarts} restarts (elastic.max_restarts) brought no newer state"


def _uncommitted(ended: int, committed: int) -> str:
    found = f"the latest commit is step {committed}" if committed else "nothing is committed"
    return f"training reached step {ended}, but {found}; events.jsonl says why"


def _age(step: int, source: Source) -> int:
    """Orders what can be started from: a fallback must be older than what was damaged, so that fallbacks end."""
    return 2 * step + (source == "memory")


def _idle(state: RunState, at: float) -> float:
    return at if state.idle_since is None else state.idle_since


def _clearing(state: RunState, at: float, **changes: object) -> RunState:
    return replace(state, phase="clearing", since=at, room_since=None, **changes)


def _over(state: RunState, phase: Phase, decision: Finish | Stop | Fail) -> Outcome:
    return replace(state, phase=phase), [decision]
