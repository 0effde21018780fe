"""The stages of a run, each skipped when its result is there already (by digest)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError, RunStopped
from configs.schema import RunConfig
from data.manifest import Manifest
from data.prepare import prepare, ray_tasks
from jobs.codebook import CodebookEncoder, codebook_facts, ensure_codebook
from jobs.evaluate import evaluate, is_done
from jobs.ledger import Ledger, duration
from jobs.references import references, write_references
from jobs.report import write_report
from jobs.train_stage import TrainStage

STAGES = ("codebook", "prepare", "train", "evaluate", "report")


class Stages:
    """Walks the stages of one run inside the controller."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        run: str,
        ledger: Ledger,
        controller: Any,
        stop_requested: Callable[[], bool],
        takes_over: bool = False,
    ) -> None:
        """`takes_over`: a controller of the same job did not get to the end."""
        self._config, self._storage, self._run, self._ledger = config, storage, run, ledger
        self._controller, self._stop_requested, self._takes_over = controller, stop_requested, takes_over
        self._manifest: Manifest | None = None
        self._encode_image: CodebookEncoder | None = None
        self._training: TrainStage | None = None

    def stop(self) -> None:
        """Pass a stop request to the stage that is training."""
        if self._training is not None:
            self._training.stop()

    def walk(self, names: list[str]) -> None:
        """Run the named stages in order; raises RunStopped between stages when a stop was requested.

        Preparation comes with the codebook stage before it; a run without pictures has no such stage.
        """
        steps = {
            "codebook": self._codebook,
            "prepare": self._prepare,
            "train": self._train,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        wanted = {*names, "codebook"} if "prepare" in names else {*names}
        if self._config.images is None:
            wanted.discard("codebook")
        for name in STAGES:
            if name not in wanted:
                continue
            if self._stop_requested() and not (self._takes_over and name == "train"):
                raise RunStopped(f"stopped on request before the {name} stage")
            started = time.monotonic()
            self._ledger.event("stage_started", stage=name)
            self._ledger.update(stage=name)
            skipped = steps[name]()
            seconds = time.monotonic() - started
            self._ledger.event("stage_skipped" if skipped else "stage_finished", stage=name, seconds=round(seconds, 3))
            self._ledger.say(f"stage {name}: " + ("already done" if skipped else f"done in {duration(seconds)}"))

    def _say(self, line: str) -> None:
        self._ledger.say(line)

    def _data(self) -> Manifest:
        """The manifest that the run refers to; raises ConfigError when the prepare stage has not run."""
        if self._manifest is None:
            folder = references(self._ledger.folder)["data"]
            self._manifest = Manifest.read(self._storage, folder)
        return self._manifest

    def _last_step(self) -> int:
        latest, damaged = commit.latest(self._ledger.checkpoints)
        for message in damaged:
            self._say(message)
        if latest is None:
            raise ConfigError(f"run {self._run} has no committed checkpoint yet; run --stage train first")
        return latest.step

    def _codebook(self) -> bool:
        self._ledger.update(state="preparing")
        said: list[str] = []

        def report(line: str) -> None:
            said.append(line)
            self._say(line)

        self._encode_image = ensure_codebook(self._config, self._storage, ray_tasks(1, self._stop_requested), report)
        if said:
            folder = self._encode_image.folder
            self._ledger.event("codebook_trained", folder=folder, **codebook_facts(self._storage, folder))
        return not said

    def _prepare(self) -> bool:
        self._ledger.update(state="preparing")
        prepared = []

        def report(line: str) -> None:
            prepared.append(line)
            self._say(line)

        runner = ray_tasks(self._config.data.prepare_tasks, self._stop_requested)
        encode_image = self._encode_image
        manifest = prepare(self._config, self._storage, runner, report, encode_image)
        write_references(self._ledger.folder, manifest, encode_image.folder if encode_image is not None else None)
        self._manifest = manifest
        return not prepared

    def _train(self) -> bool:
        manifest = self._data()
        self._training = TrainStage(
            self._config, self._storage, self._run, manifest, self._ledger, self._controller, self._takes_over
        )
        if self._training.is_done():
            return True
        self._ledger.update(state="training")
        if self._stop_requested():
            if not self._takes_over:
                raise RunStopped("stopped on request before training")
            # What lies in memory alone has to be committed first.
            self._training.stop()
        self._training.run()
        return False

    def _evaluate(self) -> bool:
        manifest, step = self._data(), self._last_step()
        if is_done(self._config, self._storage, self._run, manifest, step):
            return True
        self._ledger.update(state="evaluating")
        evaluate(self._config, self._storage, self._run, manifest, step, self._say, self._stop_requested)
        return False

    def _report(self) -> bool:
        self._ledger.update(state="reporting")
        write_report(self._storage, self._run)
        return False
