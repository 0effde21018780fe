"""The training loop, one page. It knows neither Ray nor DeepSpeed: an engine steps, batches arrive, a reporter hears.

The same loop runs in a Ray actor (`jobs.worker`) and in a plain process (`jobs.train_local`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class StepResult(Protocol):
    """What one optimizer step reports: global means per target token, the gradient's norm before clipping."""

    loss: float
    nll: float
    grad_norm: float
    target_tokens: int
    stop: bool


class Engine(Protocol):
    """One rank's share of an optimizer step."""

    def train_step(
        self, batches: Sequence[Any], step: int, learning_rate: float, stop: bool, before_update: Callable[[], None]
    ) -> StepResult:
        """Run forward, backward and update; `stop` asks all ranks to end after this step.

        Each rank calls `before_update` in between, and none updates before all have returned from it.
        """


class Batches(Protocol):
    """This replica's micro-batches, step by step."""

    data_wait_seconds: float

    def next_step(self) -> Sequence[Any]:
        """Micro-batches of the next optimizer step."""


class Reporter(Protocol):
    """Who hears of progress and says when to stop."""

    def on_step(self, record: StepRecord) -> None:
        """Called on every rank after every step."""

    def before_update(self) -> None:
        """Wait for what must be safe before any rank can have done the step."""

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""

    def checkpoint(self, step: int, tokens: int) -> None:
        """Called on every rank when the state after `step` is to be committed."""


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    tokens: int
    loss: float
    nll: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    data_wait_seconds: float
    step_seconds: float
    world_size: int
    attempt: int
    unix_seconds: float
    memory_bytes: int

    def as_dict(self) -> dict[str, float | int]:
        """JSON object of the record."""
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """From where to where an attempt trains."""

    first_step: int
    last_step: int
    tokens: int
    checkpoint_every: int
    world_size: int
    attempt: int


@dataclass(frozen=True)
class LoopEnd:
    """How an attempt ended: the last step done, target tokens so far, and whether a stop was asked for."""

    step: int
    tokens: int
    stopped: bool


def train(
    engine: Engine,
    batches: Batches,
    learning_rate: Callable[[int], float],
    reporter: Reporter,
    course: Course,
    memory_bytes: Callable[[], int],
) -> LoopEnd:
    """Train steps `first_step..last_step` (1-based, inclusive); all ranks leave after the same step."""
    tokens, step, stopped = course.tokens, course.first_step - 1, False
    while step < course.last_step and not stopped:
        step += 1
        started = time.perf_counter()
        micro_batches = batches.next_step()
        rate = learning_rate(step)
        result = engine.train_step(micro_batches, step, rate, reporter.stop_requested(), reporter.before_update)
        seconds = time.perf_counter() - started
        tokens, stopped = tokens + result.target_tokens, result.stop
        reporter.on_step(
            StepRecord(
                step=step,
                tokens=tokens,
                loss=result.loss,
                nll=result.nll,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens_per_second=result.target_tokens / seconds,
                data_wait_seconds=batches.data_wait_seconds,
                step_seconds=seconds,
                world_size=course.world_size,
                attempt=course.attempt,
                unix_seconds=time.time(),
                memory_bytes=memory_bytes(),
            )
        )
        if step % course.checkpoint_every == 0 or step == course.last_step or stopped:
            reporter.checkpoint(step, tokens)
    return LoopEnd(step, tokens, stopped and step < course.last_step)
