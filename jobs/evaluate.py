"""The evaluate stage: held-out records of every corpus, sliced, answered by evaluators, scored into results.json.

Slices that are answered already (for this checkpoint, these data and settings) are not answered again, so a killed
evaluation goes on where it was. Only complete results are written as results.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from cluster.commit import Committed
from cluster.storage import Storage
from configs.errors import DataError, StorageError, TelarError
from configs.schema import RunConfig, TaskSection
from data.held_out import read_records
from data.manifest import Manifest
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.drops import add_drops, check_comparisons
from jobs.explanations import explanations
from jobs.fan_out import RayRunner, Runner
from jobs.harness import harness_results
from jobs.loading import choose_checkpoints
from jobs.machine import hardware, versions
from jobs.results import Cell, cell_result, energy_results, inputs_digest, overall_result, samples, table_lines
from jobs.slices import cut, decoding_of, is_answered, read_energy, read_rows
from jobs.tasks.base import TrainingFacts
from jobs.tasks.from_data import DataTask
from jobs.tasks.registry import tasks_of
from jobs.tasks.rows import digest_of_definition, digest_of_rows, read_rows_of
from jobs.training_facts import training_facts

RESULTS = "evaluation/results.json"
INCOMPLETE = "evaluation/incomplete.json"


class EvaluationError(TelarError):
    """Some cells of an evaluation have no result."""


def is_done(config: RunConfig, storage: Storage, run: str, manifest: Manifest, step: int) -> bool:
    """Whether results.json holds the results of this step's checkpoint under these settings."""
    folder = storage.child(run)
    committed = choose_checkpoints(storage, run, step, config.evaluate.average_checkpoints)
    try:
        found = json.loads(folder.read_text(RESULTS))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    try:
        digest = inputs_digest(config, digest_of(committed), manifest.digest)
    except (DataError, StorageError):
        # Rows of a task cannot be listed; evaluating says so in the task's cell.
        return False
    return found.get("digest") == digest


def digest_of(committed: Sequence[Committed]) -> str:
    """What stands for the checkpoints that a model was made of: their digests, in the order of their steps."""
    return " ".join(each.digest for each in committed)


def evaluate(
    config: RunConfig,
    storage: Storage,
    run: str,
    manifest: Manifest,
    step: int,
    report: Callable[[str], None],
    should_stop: Callable[[], bool],
    runner: Runner | None = None,
    facts: Callable[[], TrainingFacts] | None = None,
) -> dict[str, Any]:
    """Evaluate the committed checkpoint of `step` and write RUN/evaluation/results.json; returns its content.

    `runner` hands out slices (default: `evaluate.workers` Ray actors) and `facts` counts the training targets for the
    baselines (default: from the prepared shards). Raises RunStopped when `should_stop` says so (finished slices stay),
    and EvaluationError, after writing evaluation/incomplete.json, when a cell failed or misses slices.
    """
    started = time.monotonic()
    folder = storage.child(run)
    committed = choose_checkpoints(storage, run, step, config.evaluate.average_checkpoints)
    cells = plan(config, storage, manifest, digest_of(committed))
    try:
        # Of the files as they are now, before anything is answered.
        digest = inputs_digest(config, digest_of(committed), manifest.digest)
    except (DataError, StorageError):
        # The cells of tasks whose files cannot be listed say so; what is incomplete is never taken for done.
        digest = ""
    slices = [piece for cell in cells for piece in cell.slices]
    todo = sorted(
        (piece for piece in slices if not is_answered(folder, piece)), key=lambda piece: (-piece.cost, piece.key)
    )
    for piece in todo:
        # Files are written once; one that holds errors makes room for another try.
        folder.remove(piece.path)
    records = sum(len(cell.examples) for cell in cells)
    report(
        f"evaluating step {step}: {len(cells)} cells, {records} records in {len(slices)} slices, "
        f"{len(slices) - len(todo)} answered already"
    )
    if runner is None:
        task = EvaluatorTask(config, storage.url, run, step)
        timeout = config.elastic.start_timeout_seconds
        runner = RayRunner(partial(load_evaluator, task), config.evaluate.workers, run, timeout)
    progress = Progress(report, len(todo))
    with ThreadPoolExecutor(1, thread_name_prefix="training-facts") as pool:
        counting = pool.submit(facts or partial(training_facts, config, storage, manifest, step))
        given_up = runner.run(todo, progress.done, should_stop)
        known = counting.result()
    for cell in cells:
        for piece in cell.slices:
            rows = read_rows(folder, piece)
            if rows is None:
                cell.problems.append(given_up.get(piece.key, f"slice {piece.key} was not answered"))
            else:
                cell.rows.extend(rows)
                cell.note(read_energy(folder, piece))
        if cell.problems:
            cell.rows.clear()
    found = [cell_result(cell, known, config) for cell in cells]
    add_drops(cells, found, config)
    overall = overall_result(cells, found, known, config)
    by_harness, harness = harness_results(config, storage, run, step, digest_of(committed), should_stop)
    found += by_harness
    for line in table_lines([*([overall] if overall else []), *found]):
        report(line)
    failed = [f"{c['task']} of {c['corpus']}: {c['detail']}" for c in found if c["status"] in ("missing", "failed")]
    content = {
        "digest": digest,
        "step": step,
        "checkpoint": f"checkpoints/{committed[-1].folder}",
        "checkpoint_digest": committed[-1].digest,
        "data_digest": manifest.digest,
        "training_tokens_counted": known.ngrams.tokens,
        "cells": [*([overall] if overall else []), *found],
        "failed": failed,
        "energy": energy_results(cells),
        "samples": samples(cells, config.evaluate.samples),
        "explanations": explanations(cells),
        "lm_eval": harness,
        "records": records,
        "slices": len(slices),
        "slices_reused": len(slices) - len(todo),
        "seconds": round(time.monotonic() - started, 3),
        "evaluators": config.evaluate.workers,
        "settings": {
            "decoding": decoding_of(config.evaluate),
            "averaged_steps": [each.step for each in committed],
            "dtype": "float32",
            "device": "cpu",
            "batch": f"the records of a slice, {config.evaluate.slice_records} at most",
        },
        "versions": versions(),
        "hardware": hardware(),
        "finished_unix": time.time(),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    if failed:
        folder.write_text(INCOMPLETE, text)
        raise EvaluationError(
            f"evaluation of step {step}: {len(failed)} of {len(found)} cells have no result "
            f"({folder.url}/{INCOMPLETE} lists them)\n  " + "\n  ".join(failed)
        )
    folder.write_text(RESULTS, text)
    folder.remove(INCOMPLETE)
    return json.loads(text)


def plan(config: RunConfig, storage: Storage, manifest: Manifest, checkpoint_digest: str) -> list[Cell]:
    """All cells with their examples and slices; the same for every call with the same arguments."""
    inputs = {
        "checkpoint": checkpoint_digest,
        "data": manifest.digest,
        "tokenizer": manifest.tokenizer_digest,
    }
    cells = []
    for corpus in config.data.corpora:
        for task in tasks_of(corpus, config.model.architecture != "encoder"):
            records = read_records(storage, manifest, corpus.name, task.limit(config), config.run.seed)
            examples = task.examples(records, corpus.task, config)
            slices = cut(
                corpus.name,
                task.name,
                task.version,
                examples,
                config.evaluate.slice_records,
                config.evaluate.max_new_tokens,
                inputs,
                decoding_of(config.evaluate),
            )
            cells.append(Cell(corpus.name, task, examples, slices))
    cells += [_cell_of(definition, config, inputs) for definition in config.evaluate.definitions]
    check_comparisons(cells)
    return cells


def _cell_of(definition: TaskSection, config: RunConfig, inputs: dict[str, str]) -> Cell:
    """The cell of a task as data; one whose rows cannot be had is a cell with that problem, and the others go on."""
    task = DataTask(definition)
    try:
        records = read_rows_of(definition, task.limit(config), config.run.seed)
        examples = task.examples(records, definition.name, config)
    except (DataError, StorageError) as error:
        return Cell(definition.name, task, [], [], problems=[str(error)])
    slices = cut(
        definition.name,
        task.name,
        task.version,
        examples,
        config.evaluate.slice_records,
        task.max_new_tokens(config),
        {**inputs, "data": digest_of_rows(records), "definition": digest_of_definition(definition)},
        decoding_of(config.evaluate),
    )
    return Cell(definition.name, task, examples, slices)


class Progress:
    """Says how far the slices are, at most about ten times."""

    def __init__(self, report: Callable[[str], None], total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def done(self, piece: Any) -> None:
        """One more slice is answered."""
        self._done += 1
        every = max(1, self._total // 10)
        if self._done % every == 0 or self._done == self._total:
            self._report(f"evaluated {self._done}/{self._total} slices")
