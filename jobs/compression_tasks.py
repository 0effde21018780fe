"""What compression changed at the tasks: each corpus's own figure, over the first of its held-out records."""

from __future__ import annotations

from typing import Any

from cluster.storage import Storage
from data.held_out import read_records
from jobs.answers import ModelAnswers, codebook_of
from jobs.evaluator import Evaluator
from jobs.loading import Trained
from jobs.slices import cut
from jobs.tasks.base import TrainingFacts
from jobs.tasks.registry import TASKS

# Answers are written, token by token, by every model of the table: fewer records than an evaluation has.
TASK_RECORDS = 64


def task_figures(storage: Storage, run: str, trained: Trained, facts: TrainingFacts) -> list[dict[str, Any]]:
    """One object per corpus with a task: corpus, task, and name, label, value, low, high, n and unit of its figure.

    The figure is the task's headline, else its first; records that cannot be answered are left out. `run` is the one
    that made the codebook of pictures.
    """
    config, found = trained.config, []
    codebook = codebook_of(config, storage, run, trained.manifest)
    evaluator = Evaluator(ModelAnswers(trained.model, trained.tokenizer, config, codebook), storage.child(run))
    for corpus in config.data.corpora:
        if corpus.task == "likelihood":
            continue
        task = TASKS[corpus.task]
        limit = min(TASK_RECORDS, task.limit(config))
        records = read_records(storage, trained.manifest, corpus.name, limit, config.run.seed)
        examples = task.examples(records, corpus.task, config)
        own = config.evaluate
        slices = cut(corpus.name, task.name, task.version, examples, own.slice_records, own.max_new_tokens, {})
        rows = [row for piece in slices for row in evaluator.rows(piece)]
        answered = [pair for pair in zip(examples, rows, strict=True) if pair[1].error is None]
        if not answered:
            continue
        metrics = task.score(*zip(*answered, strict=True), facts, corpus.name, config)
        chosen = next((metric for metric in metrics if metric.name == task.headline), metrics[0])
        kept = ("name", "label", "value", "low", "high", "n", "unit", "higher_is_better")
        figure = {name: value for name, value in chosen.as_dict().items() if name in kept}
        found.append({"corpus": corpus.name, "task": corpus.task, **figure})
    return found
