"""What a tracker is, and how a run feeds several without waiting for them or stopping for them.

The id that a tracker knows the run by lies in RUN/tracking.json, written before the first figure is sent: a resumed
run, on whatever node its controller lives then, continues the same curve.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import flat
from configs.schema import RunConfig

IDS = "tracking.json"
FIGURES = (
    "loss",
    "nll",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "data_wait_seconds",
    "step_seconds",
    "memory_bytes",
    "world_size",
    "attempt",
)
# The package behind each tracker; the extra of pyproject.toml has the tracker's name.
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
QUEUED_STEPS = 10_000
CLOSE_SECONDS = 30.0


class Tracker(Protocol):
    """One place that draws curves. It is made and called in one thread, and may wait for a network.

    `errors` is what it raises when its server, its files or its credentials fail.
    """

    errors: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, folder: Storage, run: str, project: str, kept: Ids, settings: Mapping[str, Any]) -> None:
        """Open or continue the curves of the run whose folder that is."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one optimizer step; a step may come again after a restart."""

    def close(self, state: str) -> None:
        """Send what is left and tell how the run ended: finished, failed or stopped."""


def check_installed(config: RunConfig, where: str) -> None:
    """Raise ConfigError naming the extra of the first tracker that is not installed here."""
    for name in config.tracking.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed on {where}; run `pip install 'telar[{name}]'` there, or "
                "remove it from the list"
            )


def open_trackers(config: RunConfig, folder: Storage, run: str, tell: Callable[[str], None]) -> list[Feed]:
    """The trackers that the configuration names, each in a thread of its own; `folder` is the run's.

    Raises ConfigError when one is not installed. What goes wrong later is told once, and that tracker gets no more.
    """
    check_installed(config, "the node of the run's controller")
    kept = Ids(folder)
    settings = flat(config, ("model", "data", "parallelism", "optimizer", "train", "run.seed"))
    return [
        Feed(name, functools.partial(_class_of(name), folder, run, config.tracking.project, kept, settings), tell)
        for name in config.tracking.trackers
    ]


def _class_of(name: str) -> type[Tracker]:
    if name == "tensorboard":
        from jobs.trackers.tensorboard_files import TensorBoard

        return TensorBoard
    if name == "mlflow":
        from jobs.trackers.mlflow_run import MlflowRun

        return MlflowRun
    from jobs.trackers.wandb_run import WandbRun

    return WandbRun


class Ids:
    """The trackers' names for a run, in its folder."""

    def __init__(self, folder: Storage) -> None:
        self._folder, self._lock = folder, threading.Lock()

    def read(self) -> dict[str, str]:
        """All that are known."""
        try:
            return json.loads(self._folder.read_text(IDS))
        except FileNotFoundError:
            return {}

    def keep(self, tracker: str, value: str) -> None:
        """Write one down."""
        with self._lock:
            self._folder.write_text(IDS, json.dumps({**self.read(), tracker: value}, indent=1))


class Feed:
    """Steps for one tracker, in a queue: training never waits for it, and goes on without it when it fails."""

    def __init__(self, name: str, make: functools.partial[Tracker], tell: Callable[[str], None]) -> None:
        self._name, self._make, self._tell = name, make, tell
        self._errors = make.func.errors
        self._steps: queue.Queue[dict[str, Any] | str] = queue.Queue(QUEUED_STEPS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def record(self, record: dict[str, Any]) -> None:
        """Queue a step's record; where the tracker is far behind, it is left out."""
        try:
            self._steps.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self, state: str) -> None:
        """Wait until the tracker has everything, at most 30 seconds."""
        try:
            self._steps.put(state, timeout=CLOSE_SECONDS)
        except queue.Full:
            self._dropped += 1
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell(f"tracker {self._name} did not take all within {CLOSE_SECONDS:.0f} s; metrics.jsonl has all")
        elif self._dropped:
            self._tell(f"tracker {self._name} was too slow for {self._dropped} steps; metrics.jsonl has all")

    def _work(self) -> None:
        tracker = None
        try:
            tracker = self._make()
            while True:
                found = self._steps.get()
                if isinstance(found, str):
                    tracker.close(found)
                    return
                tracker.log(found["step"], {name: float(found[name]) for name in FIGURES if name in found})
        except (*self._errors, ConfigError) as error:
            kind = type(error).__name__
            self._tell(f"tracker {self._name} gets no more figures ({kind}: {error}); metrics.jsonl has all")
