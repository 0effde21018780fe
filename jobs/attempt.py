"""One live attempt: its ranks' calls, watched for their end, for the loss of a process or node, and for a hang."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import ray

from cluster import commit
from cluster.nodes import living_nodes
from configs.errors import StorageError, TelarError
from configs.schema import RunConfig
from jobs.crew import Process
from jobs.loop import LoopEnd
from jobs.outside import end, look, on_node
from jobs.progress import HangWatch
from jobs.recovery import Ended, Event, Failed, Started

BEAT_SECONDS = 0.5
# After the first error, how long others may take to fail too, so that the loss that caused it is named.
AFTERMATH_SECONDS = 0.5
# How long ranks whose peers are gone may take to notice, before they are killed.
LEAVE_SECONDS = 3.0
STACK_SECONDS = 3.0
# A process must be started for it, which looks at the one that does not answer.
LOOK_SECONDS = 15.0
KILL_SECONDS = 10.0


class Attempt:
    """The ranks of one attempt, all of whose `train` calls are going on. `serial` is its number in jobs.recovery."""

    def __init__(
        self, config: RunConfig, serial: int, number: int, processes: Sequence[Process], calls: Sequence[ray.ObjectRef]
    ) -> None:
        self.serial, self.number = serial, number
        self._processes, self._calls = list(processes), list(calls)
        self._ends: dict[int, LoopEnd] = {}
        self._errors: dict[int, ray.exceptions.RayError] = {}
        self._beats: dict[ray.ObjectRef, int] = {}
        self._asked_at = 0.0
        self._started = False
        self._hung: list[int] = []
        elastic = config.elastic
        waits = config.data.fetch_timeout_seconds, config.checkpoint.stall_seconds
        self._watch = HangWatch(len(calls), elastic.hang_seconds, elastic.start_timeout_seconds, *waits)
        # The error that ends the run, where a rank raised one that it would raise again.
        self.fatal: TelarError | None = None

    @property
    def trained(self) -> bool:
        """Whether all ranks got through their start."""
        return self._started

    @property
    def nodes(self) -> set[str]:
        """Nodes that hold a rank."""
        return {process.node for process in self._processes}

    def ask_to_leave(self) -> None:
        """Ask all ranks to commit and leave after the step in progress."""
        for process in self._processes:
            process.actor.request_stop.remote(self.number)

    def step_took(self, seconds: float) -> None:
        """A step is done; how long a hang may last follows the steps."""
        self._watch.step_took(seconds)

    def slowest(self) -> tuple[int, float] | None:
        """The rank that others wait for; see `jobs.progress.HangWatch.slowest`."""
        return self._watch.slowest()

    def poll(self, living: Collection[str], timeout_seconds: float) -> list[Event]:
        """What happened, after at most `timeout_seconds`; at most one of Ended and Failed."""
        self._collect(timeout_seconds)
        at = time.monotonic()
        lost = self.nodes - set(living)
        if self._errors or lost:
            return [self._failure(at, lost)]
        if len(self._ends) == len(self._calls):
            return [Ended(at, self.serial, self._ends[0].step)]
        self._listen(at)
        if not self._started and self._watch.all_train:
            self._started = True
            return [Started(at, self.serial)]
        self._hung = self._watch.hung(at)
        if self._hung:
            silent = f"no sign of life for more than {self._watch.deadline_seconds():.1f} s"
            return [Failed(at, self.serial, f"{self._named(self._hung)} hung: {silent}")]
        return []

    def stacks(self, living: Collection[str]) -> dict[str, str]:
        """Where every rank is, when the attempt hangs; empty otherwise. Ranks that do not answer are looked at."""
        if not self._hung:
            return {}
        found = self._answers({rank: p.actor.stacks.remote() for rank, p in enumerate(self._processes)}, STACK_SECONDS)
        silent = [rank for rank, p in enumerate(self._processes) if rank not in found and p.node in living]
        found |= self._answers({rank: self._outside(look, rank) for rank in silent}, LOOK_SECONDS)
        return {f"rank {rank}": found.get(rank, "no answer") for rank in range(len(self._processes))}

    def _answers(self, asked: dict[int, ray.ObjectRef], timeout_seconds: float) -> dict[int, str]:
        """Texts by rank, as far as they come in time."""
        if not asked:
            return {}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_seconds)
        found = {}
        for rank, reference in asked.items():
            if reference in answered:
                try:
                    found[rank] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    found[rank] = str(error)
        return found

    def remains(self, living: Collection[str]) -> list[Process]:
        """Wait for the ranks to leave; returns those that must be killed. The others can train again."""
        here = [rank for rank, process in enumerate(self._processes) if process.node in living]
        self._end([rank for rank in here if rank in self._hung])
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._unfinished(here) and self._collect(deadline - time.monotonic()):
            pass
        self._end([rank for rank in self._unfinished(here) if rank not in self._hung])
        left = [rank for rank in here if rank not in self._hung and self._left(rank)]
        return [process for rank, process in enumerate(self._processes) if rank not in left]

    def _end(self, ranks: Sequence[int]) -> None:
        """Kill processes from outside: Ray's kill asks the process itself, and one that is stopped does not hear."""
        ended = [self._outside(end, rank) for rank in ranks]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=KILL_SECONDS)

    def _left(self, rank: int) -> bool:
        error = self._errors.get(rank)
        return rank in self._ends or (error is not None and not is_death(error))

    def _unfinished(self, ranks: Collection[int]) -> list[int]:
        return [rank for rank in ranks if rank not in self._ends and rank not in self._errors]

    def _collect(self, timeout_seconds: float) -> bool:
        """Take in calls that have ended, waiting for the first; whether there was one."""
        open_calls = [self._calls[rank] for rank in self._unfinished(range(len(self._calls)))]
        if not open_calls:
            return False
        done, _ = ray.wait(open_calls, num_returns=1, timeout=max(0.0, timeout_seconds))
        for call in done:
            rank = self._calls.index(call)
            try:
                self._ends[rank] = ray.get(call)
            except ray.exceptions.RayError as error:
                self._errors[rank] = error
        return bool(done)

    def _listen(self, at: float) -> None:
        """Take in the beats that were asked for, and ask again those who have answered."""
        if self._beats:
            done, _ = ray.wait(list(self._beats), num_returns=len(self._beats), timeout=0)
            for reference in done:
                rank = self._beats.pop(reference)
                try:
                    self._watch.heard(rank, ray.get(reference), at)
                except ray.exceptions.RayError:
                    # It is dead: its call says so too.
                    continue
        if at - self._asked_at >= BEAT_SECONDS:
            self._asked_at = at
            for rank in set(range(len(self._processes))) - set(self._beats.values()):
                self._beats[self._processes[rank].actor.beat.remote()] = rank

    def _failure(self, at: float, lost: set[str]) -> Failed:
        if not lost:
            deadline = time.monotonic() + AFTERMATH_SECONDS
            while self._collect(deadline - time.monotonic()):
                pass
            lost = self.nodes - living_nodes()
        for rank, error in self._errors.items():
            cause = getattr(error, "cause", None)
            if isinstance(cause, commit.DamagedCheckpoint):
                return Failed(at, self.serial, str(cause), "damaged")
            if isinstance(cause, TelarError) and not isinstance(cause, StorageError):
                self.fatal = cause
                return Failed(at, self.serial, f"rank {rank}: {cause}", "fatal")
        if lost:
            ranks = [rank for rank, process in enumerate(self._processes) if process.node in lost]
            return Failed(
                at, self.serial, f"lost {', '.join(f'node {node[:8]}' for node in lost)} with {ranks_text(ranks)}"
            )
        dead = [rank for rank, error in self._errors.items() if is_death(error)]
        if dead:
            return Failed(at, self.serial, f"lost {self._named(dead)}")
        # What storage refused one rank, the others only notice as the loss of that rank.
        refused = [rank for rank, error in self._errors.items() if _is_refusal(error)]
        rank = refused[0] if refused else next(iter(self._errors))
        error, cause = self._errors[rank], getattr(self._errors[rank], "cause", None)
        # Ray's error holds the rank's traceback, which leads; what Telar raises says enough by itself.
        said = f"{type(cause).__name__}: {cause}" if isinstance(cause, TelarError) else str(error)
        return Failed(at, self.serial, f"rank {rank} failed first: {said}")

    def _outside(self, function: Any, rank: int) -> ray.ObjectRef:
        place = self._processes[rank].place
        return on_node(function, place.node).remote(place.pid, place.created)

    def _named(self, ranks: Sequence[int]) -> str:
        places = [self._processes[rank].place for rank in ranks]
        return ", ".join(
            f"rank {rank} (process {place.pid} on node {place.node[:8]})"
            for rank, place in zip(ranks, places, strict=True)
        )


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 2` or `ranks 2, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_refusal(error: ray.exceptions.RayError) -> bool:
    return isinstance(getattr(error, "cause", None), StorageError | OSError)


def is_death(error: ray.exceptions.RayError) -> bool:
    """Whether the rank's own process is gone, rather than another actor that it called."""
    return isinstance(error, ray.exceptions.RayActorError) and not isinstance(error, ray.exceptions.RayTaskError)
