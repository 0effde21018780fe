"""Handing slices to evaluators: in this process one after the other, or to Ray actors with retry when one dies."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from cluster.environment import check_fingerprint
from configs.errors import CapacityError, RunStopped, TelarError
from jobs.slices import Slice

MOST_TRIES = 3
POLL_SECONDS = 0.5


class SliceWorker(Protocol):
    """Answers slices and leaves the rows in storage."""

    def work(self, piece: Slice) -> None:
        """Answer one slice and write its Parquet."""


Progress = Callable[[Slice], None]
ShouldStop = Callable[[], bool]


class Runner(Protocol):
    """Runs all slices; returns the reason for each key that was given up, raises RunStopped on request."""

    def run(self, slices: Sequence[Slice], on_done: Progress, should_stop: ShouldStop) -> dict[str, str]:
        """Slices come longest first."""


class SerialRunner:
    """One worker in this process, made when there is work."""

    def __init__(self, make_worker: Callable[[], SliceWorker]) -> None:
        self._make_worker = make_worker

    def run(self, slices: Sequence[Slice], on_done: Progress, should_stop: ShouldStop) -> dict[str, str]:
        """Answer the slices in order; an error of a worker is raised."""
        if not slices:
            return {}
        worker = self._make_worker()
        for piece in slices:
            if should_stop():
                raise RunStopped("stopped on request during evaluation; finished slices are kept")
            worker.work(piece)
            on_done(piece)
        return {}


class EvaluatorActor:
    """A process on some node of the cluster that loads the checkpoint once and then answers slices."""

    def __init__(self, make_worker: Callable[[], SliceWorker]) -> None:
        check_fingerprint()
        self._make_worker = make_worker
        self._worker: SliceWorker | None = None

    def load(self) -> int:
        """Load the checkpoint; returns the process id."""
        self._worker = self._make_worker()
        return os.getpid()

    def work(self, piece: Slice) -> None:
        """Answer one slice; `load` was called before."""
        assert self._worker is not None
        self._worker.work(piece)


class RayRunner:
    """`workers` actors of one CPU each, every one given the next slice when it has finished one.

    A slice whose actor died or raised is tried again, at most three times in all. An actor that died is replaced,
    unless one that is done can take its slice: with a lost node there may be no CPU for another one.
    """

    def __init__(
        self, make_worker: Callable[[], SliceWorker], workers: int, label: str, start_timeout_seconds: float
    ) -> None:
        self._make_worker, self._workers, self._label = make_worker, workers, label
        self._start_timeout_seconds = start_timeout_seconds
        self._spawned = 0

    def run(self, slices: Sequence[Slice], on_done: Progress, should_stop: ShouldStop) -> dict[str, str]:
        """Answer all slices. Raises CapacityError when no evaluator starts in time, and what loading raises."""
        pending, tries, given_up = deque(slices), Counter(), {}
        actors: list[Any] = []
        busy: dict[ray.ObjectRef, tuple[Any, Slice | None]] = {}
        idle: list[Any] = []
        deaths_at_start = 0
        last_event = time.monotonic()

        def spawn() -> None:
            actor = self._actor()
            actors.append(actor)
            busy[actor.load.remote()] = (actor, None)

        try:
            for _ in range(min(self._workers, len(pending))):
                spawn()
            # Evaluators that still wait for a CPU when the last slice is done are not waited for.
            while pending or any(piece is not None for _, piece in busy.values()):
                if should_stop():
                    raise RunStopped("stopped on request during evaluation; finished slices are kept")
                done, _ = ray.wait(list(busy), num_returns=1, timeout=POLL_SECONDS)
                if not done:
                    nobody_works = all(piece is None for _, piece in busy.values())
                    if nobody_works and time.monotonic() - last_event > self._start_timeout_seconds:
                        raise CapacityError(self._no_start())
                    continue
                last_event = time.monotonic()
                actor, piece = busy.pop(done[0])
                alive, problem = self._outcome(done[0], loading=piece is None)
                if piece is None and not alive:
                    deaths_at_start += 1
                    if deaths_at_start >= MOST_TRIES:
                        raise TelarError(f"evaluators died {deaths_at_start} times while loading: {problem}")
                elif piece is None:
                    deaths_at_start = 0
                elif problem is None:
                    on_done(piece)
                else:
                    tries[piece.key] += 1
                    if tries[piece.key] < MOST_TRIES:
                        pending.append(piece)
                    else:
                        given_up[piece.key] = f"given up after {MOST_TRIES} tries: {problem}"
                if alive:
                    idle.append(actor)
                while pending and idle:
                    actor, piece = idle.pop(), pending.popleft()
                    busy[actor.work.remote(piece)] = (actor, piece)
                if pending and not alive:
                    spawn()
            return given_up
        finally:
            for actor in actors:
                ray.kill(actor)

    def _actor(self) -> Any:
        name = f"{self._label}/evaluator-{self._spawned}"
        self._spawned += 1
        return (
            ray.remote(EvaluatorActor)
            .options(
                name=name,
                namespace="telar",
                num_cpus=1,
                max_restarts=0,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}},
            )
            .remote(self._make_worker)
        )

    def _outcome(self, reference: ray.ObjectRef, loading: bool) -> tuple[bool, str | None]:
        """Whether the actor lives, and what went wrong; an error in loading is raised, since it would come again."""
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if loading:
                cause = getattr(error, "cause", None)
                raise (cause if isinstance(cause, TelarError) else TelarError(str(error))) from error
            return True, str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            return False, f"the evaluator died ({type(error).__name__})"
        return True, None

    def _no_start(self) -> str:
        free = ray.available_resources().get("CPU", 0)
        return (
            f"no evaluator started within {self._start_timeout_seconds:.0f} s: each takes 1 CPU, {free:g} are free; "
            "stop other work on the cluster or raise elastic.start_timeout_seconds"
        )
