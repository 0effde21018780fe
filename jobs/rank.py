"""One training rank, from checkpoint to loop to checkpoint; the process around it may be a Ray actor or a plain one."""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from cluster import commit
from cluster.storage import SpooledText, Storage
from configs.errors import StorageError
from configs.load import config_digest
from configs.redaction import redacted
from configs.schema import RunConfig
from data.loader import Loader
from data.manifest import Manifest
from data.opener import CacheOpener
from data.quarantine import shards_named
from data.state import check_state
from data.tokenizer import read_tokenizer
from jobs.batches import to_model
from jobs.classes import Classes
from jobs.delivery import Delivery
from jobs.loop import Batches, Course, LoopEnd, StepRecord, train
from jobs.machine import hardware, versions
from jobs.pretrained import initial_parameters
from jobs.progress import Progress
from jobs.sample_log import LoggedBatches
from jobs.upload import Upload
from model.batch import ModelBatch
from model.checkpoint import CheckpointReader, snapshot, snapshot_bytes, write_snapshot
from model.engine import Engine, create_engine
from model.fragments import restore
from model.schedule import learning_rate


@dataclass(frozen=True)
class RankTask:
    """What one rank of one attempt is told."""

    config: RunConfig
    storage_url: str
    run: str
    data_folder: str
    attempt: int
    rank: int
    world_size: int
    resume_step: int | None
    # Where the state of `resume_step` lies in memory of the cluster, if it does: a `jobs.vault.Snapshot`.
    memory: Any = None


class Messages:
    """What a rank sends out; each process kind has its own. Methods must not block on the network."""

    def step(self, record: dict[str, Any]) -> None:
        """A step of rank 0 is done."""

    def unwritten(self) -> list[dict[str, Any]]:
        """Steps that were sent and may not lie in storage yet."""
        return []

    def rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """This rank's part of a checkpoint lies in storage."""

    def problem(self, text: str) -> None:
        """Something went wrong that training goes on without."""

    def snapshot(
        self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict, content: np.ndarray
    ) -> None:
        """Keep this rank's part of a snapshot (uint8) in memory of the cluster; returns when it is safe.

        Called in a thread of its own; `content` is another step's afterwards.
        """


class RankReporter:
    """The loop's reporter: sends steps, writes checkpoint files behind the training thread's back, hears stops."""

    def __init__(
        self, engine: Engine, task: RankTask, manifest: Manifest, messages: Messages, progress: Progress
    ) -> None:
        self._engine, self._task, self._manifest, self._messages = engine, task, manifest, messages
        self._progress = progress
        self._stop = threading.Event()
        self._checkpoints = Storage(task.storage_url).child(task.run, "checkpoints")
        # The state of the data after the steps done so far; set before the first step.
        self.data_state: Callable[[], dict[str, Any]] | None = None
        self._upload: Upload | None = None
        self._delivery: Delivery | None = None
        self._content: np.ndarray | None = None

    def request_stop(self) -> None:
        """Ask the loop to commit and leave after the step it is in; may be called from any thread."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop.is_set()

    def on_step(self, record: StepRecord) -> None:
        """Rank 0 speaks for all: loss, norm and tokens are global already."""
        every = self._task.config.elastic.snapshot_every
        if every and record.step % every == 0:
            self._remember(record)
        self._progress.beat("data", record.step)
        if self._task.rank == 0:
            self._messages.step(record.as_dict())

    def checkpoint(self, step: int, tokens: int) -> None:
        """Copy the state now, upload it in the background; waits only if the previous upload is still going on."""
        self._progress.beat("storage", step)
        self._wait()
        self._progress.beat("step", step)
        copies, data_state = snapshot(self._engine), self.data_state()
        self._upload = Upload(step, lambda upload: self._write(upload, copies, tokens, data_state))
        self._progress.beat("data", step)

    def _remember(self, record: StepRecord) -> None:
        """Copy the state, and bring it to safety while the next step's gradients are computed."""
        self.before_update()
        task, step = self._task, record.step
        content = self._content = snapshot_bytes(self._engine, {"step": str(step)}, self._content)
        extra: dict[str, Any] = {"tokens": record.tokens, "data_state": self.data_state()}
        if task.rank == 0:
            # What a commit of the step would say, and what the books may lack if the controller dies now.
            extra = {**self._extra(step, **extra), "records": [*self._messages.unwritten(), record.as_dict()]}

        def deliver() -> None:
            digest = xxhash.xxh3_128_hexdigest(content)
            file = commit.RankFile(task.rank, commit.rank_file_name(task.rank), len(content), digest)
            self._messages.snapshot(step, task.attempt, file, task.world_size, extra, content)

        self._delivery = Delivery(f"snapshot-{step}", deliver)

    def before_update(self) -> None:
        """Until the snapshot of the step before is safe: a rank that has done a step knows that all of them are.

        Raises what became of it otherwise.
        """
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.wait()

    def close(self) -> None:
        """Wait for the last snapshot and the last upload, and pass on their errors, if they had one."""
        self.before_update()
        self._wait()

    def _wait(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        seconds, step = self._task.config.checkpoint.stall_seconds, self._progress.latest.step
        if not upload.wait(seconds, lambda: self._progress.beat("storage", step)):
            self._messages.problem(
                f"rank {self._task.rank} gave up writing its part of step {upload.step}: storage took nothing for "
                f"{seconds:g} s (checkpoint.stall_seconds); training goes on"
            )

    def _write(self, upload: Upload, copies: Any, tokens: int, data_state: dict[str, Any]) -> None:
        task, step = self._task, upload.step
        try:
            file = write_snapshot(self._checkpoints, step, task.attempt, task.rank, copies, moved=upload.moved)
            if upload.given_up:
                return
        except (StorageError, OSError) as error:
            # This checkpoint is lost, not the run: the step stays uncommitted and the one before it the latest.
            if not upload.given_up:
                self._messages.problem(f"rank {task.rank} could not write its part of step {step}: {error}")
            return
        extra = self._extra(step, tokens, data_state)
        self._messages.rank_file(step, task.attempt, file, task.world_size, extra)

    def _extra(self, step: int, tokens: int, data_state: dict[str, Any]) -> dict[str, Any]:
        """What the manifest of a commit says beside the files."""
        return {
            "tokens": tokens,
            "samples": step * self._task.config.train.global_batch_sequences,
            "data_state": data_state,
            **self._origin,
        }

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """Where the state comes from: the same at all steps."""
        config = self._task.config
        return {
            "run": self._task.run,
            "data_digest": self._manifest.digest,
            "tokenizer_digest": self._manifest.tokenizer_digest,
            "vocabulary_size": self._manifest.vocabulary_size,
            "config_digest": config_digest(config),
            "model": config.model.model_dump(mode="json"),
            "seed": config.run.seed,
            "parallelism": config.parallelism.model_dump(mode="json"),
            "parameters": self._engine.parameter_count,
            "versions": versions(),
            "hardware": hardware(),
        }


def run_rank(
    task: RankTask,
    messages: Messages,
    open_shard: CacheOpener,
    announce: Callable[[RankReporter], None],
    progress: Progress,
    memory: tuple[Storage, commit.Committed] | None = None,
) -> LoopEnd:
    """Train one attempt's share on one rank.

    Expects RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. `announce` receives the
    reporter before the first step, so that a stop can be passed to it from another thread. `progress` is kept up.
    `memory` is the state to start from where that is none of storage.
    """
    storage = Storage(task.storage_url)
    config, manifest = task.config, Manifest.read(storage, task.data_folder)
    checkpoints = storage.child(task.run, "checkpoints")
    log = start_log(storage.child(task.run), task.rank)
    logging.info("attempt %d rank %d of %d starts", task.attempt, task.rank, task.world_size)
    fresh = task.resume_step is None
    initial = initial_parameters(config.model, manifest.vocabulary_size, config.run.seed) if fresh else None
    engine = create_engine(config, manifest.vocabulary_size, manifest.pad_id, initial)
    reporter = RankReporter(engine, task, manifest, messages, progress)
    loader, sampled = None, None
    try:
        step, tokens = 0, 0
        if not fresh:
            source, committed = memory or (checkpoints, commit.read_commit(checkpoints, task.resume_step))
            data_state = committed.manifest["data_state"]
            check_state(data_state, manifest, config)
            open_shard.restore(shards_named(manifest, data_state["quarantined"]))
            restore(engine, CheckpointReader(source, committed))
            step, tokens = committed.step, int(committed.manifest["tokens"])
            logging.info("state of step %d restored", step)
        # All ranks of one replica read the same samples.
        replica = engine.context.data
        loader = Loader(manifest, config, open_shard, replica.rank, replica.size, start_step=step)
        reporter.data_state = loader.state
        announce(reporter)
        course = Course(
            first_step=step + 1,
            last_step=config.train.steps,
            tokens=tokens,
            checkpoint_every=config.checkpoint.every_steps,
            world_size=task.world_size,
            attempt=task.attempt,
        )

        def rate(at: int) -> float:
            return learning_rate(config.optimizer, config.model.d_model, at, config.train.steps)

        progress.beat("data", step)
        classes = Classes(config.model.labels, read_tokenizer(storage, manifest)) if config.model.labels else None
        batches: Batches = TorchBatches(loader, progress, classes)
        if config.tracking.log_samples and engine.context.speaks:
            batches = sampled = LoggedBatches(batches, storage.child(task.run), task.attempt, task.rank, step)
        end = train(engine, batches, rate, reporter, course, peak_memory_bytes)
        if memory is not None and step == end.step:
            # The last step was done before the loss, and its state lies in memory alone.
            reporter.checkpoint(end.step, end.tokens)
        progress.beat("storage", end.step)
        reporter.close()
        logging.info("attempt %d rank %d ends at step %d", task.attempt, task.rank, end.step)
        return end
    except BaseException:
        logging.exception("attempt %d rank %d failed", task.attempt, task.rank)
        raise
    finally:
        if loader is not None:
            loader.close()
        if sampled is not None:
            sampled.close()
        engine.close()
        log.close()


class TorchBatches:
    """The loader's NumPy micro-batches as the engine's tensors, without a copy on CPU; targets as `classes` if any."""

    def __init__(self, loader: Loader, progress: Progress, classes: Classes | None = None) -> None:
        self._loader, self._progress, self._classes = loader, progress, classes

    @property
    def data_wait_seconds(self) -> float:
        """Seconds that the latest step waited for data."""
        return self._loader.data_wait_seconds

    def next_step(self) -> list[ModelBatch]:
        """Micro-batches of the next optimizer step."""
        batches = [to_model(batch) for batch in self._loader.next_step()]
        if self._classes is not None:
            batches = [self._classes.batch(batch) for batch in batches]
        self._progress.beat("step", self._progress.latest.step)
        return batches


def peak_memory_bytes() -> int:
    """Highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _LogLines(logging.Handler):
    def __init__(self, text: SpooledText) -> None:
        super().__init__()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        self._text.append(redacted(self.format(record)))

    def close(self) -> None:
        logging.getLogger().removeHandler(self)
        self._text.close()
        super().close()


def start_log(folder: Storage, rank: int) -> logging.Handler:
    """Send this process's log records to `logs/rank-RRRRR.log` of the run, without ANSI codes."""
    handler = _LogLines(SpooledText(folder, f"logs/rank-{rank:05d}.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    return handler
