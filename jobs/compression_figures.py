"""What compression changed, measured: loss on held-out records, bytes on disk and in memory, tokens/s of decoding."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.storage import Storage
from data.held_out import read_records
from data.packing import fit_source
from jobs.answers import ModelAnswers, keeps_head
from jobs.compression_tasks import TASK_RECORDS, task_figures
from jobs.loading import Trained
from jobs.tasks.base import LogLikelihood
from jobs.training_facts import training_facts
from model.checkpoint import file_bytes
from model.generation import generate
from model.quantize import memory_bytes, model_fragments

BATCHES = (1, 32)
# Decoding is timed on prompts and outputs of these lengths, so many times, models in turn; the median counts.
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 5


@dataclass(frozen=True)
class Subject:
    """A model that stands in the table under a label."""

    label: str
    trained: Trained


def figures(storage: Storage, run: str, subjects: list[Subject]) -> list[dict[str, Any]]:
    """One row per subject: label, disk_bytes, memory_bytes, nll, tokens, nll_of, tasks, tokens_per_second.

    `disk_bytes` is what a file of the weights alone takes, without an optimizer's moments. `nll` is in nats per target
    token over the held-out records that evaluation scores (`evaluate.likelihood_records` per corpus); None when there
    are none. `tasks` is what `task_figures` gives; `run` is one of theirs. `tokens_per_second` gives median, lowest and
    highest by batch size.
    """
    speeds = decoding_speeds({subject.label: subject.trained for subject in subjects}, storage)
    rows = []
    first = subjects[0].trained
    facts = training_facts(first.config, storage, first.manifest, first.steps[-1])
    for subject in subjects:
        model = subject.trained.model
        losses = held_out_losses(storage, subject.trained)
        tokens = sum(count for _, count in losses.values())
        rows.append(
            {
                "label": subject.label,
                "disk_bytes": file_bytes(model_fragments(model)),
                "memory_bytes": memory_bytes(model),
                "nll": sum(total for total, _ in losses.values()) / tokens if tokens else None,
                "tokens": tokens,
                "nll_of": {corpus: total / count for corpus, (total, count) in losses.items() if count},
                "tasks": task_figures(storage, run, subject.trained, facts),
                "tokens_per_second": speeds[subject.label],
            }
        )
    return rows


def held_out_losses(storage: Storage, trained: Trained) -> dict[str, tuple[float, int]]:
    """Sum of nats and number of target tokens over held-out records, by corpus."""
    config, found = trained.config, {}
    answers = ModelAnswers(trained.model, trained.tokenizer, config)
    for corpus in config.data.corpora:
        limit = config.evaluate.likelihood_records
        records = read_records(storage, trained.manifest, corpus.name, limit, config.run.seed)
        total, count = [], 0
        for start in range(0, len(records), config.evaluate.slice_records):
            part = records[start : start + config.evaluate.slice_records]
            requests = [LogLikelihood(record.source, record.target) for record in part]
            for answer in answers.answer(corpus.name, requests, config.evaluate.max_new_tokens):
                total.extend(answer["nll"])
                count += len(answer["labels"])
        found[corpus.name] = math.fsum(total), count
    return found


def decoding_speeds(subjects: Mapping[str, Trained], storage: Storage) -> dict[str, dict[str, Any]]:
    """Generated tokens per second of each model by batch size: {"1": {"median", "lowest", "highest"}, ...}.

    Models take turns, so that what else the machine does meets all of them.
    """
    some = next(iter(subjects.values()))
    prompts, new_tokens = _prompts(storage, some)
    rates: dict[str, dict[int, list[float]]] = {label: {batch: [] for batch in BATCHES} for label in subjects}
    for batch in BATCHES:
        rows = [prompts[number % len(prompts)] for number in range(batch)]
        for measured in (False, *[True] * ROUNDS):
            for label, trained in subjects.items():
                started = time.perf_counter()
                generate(trained.model, rows, trained.tokenizer.bos_id, [], new_tokens)
                if measured:
                    rates[label][batch].append(batch * new_tokens / (time.perf_counter() - started))
    return {
        label: {
            str(batch): {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
            for batch, found in of_label.items()
        }
        for label, of_label in rates.items()
    }


def _prompts(storage: Storage, trained: Trained) -> tuple[list[list[int]], int]:
    """Encoded sources of held-out records (a token where a corpus has none), and how many tokens to generate."""
    config, length, new_tokens = trained.config, PROMPT_TOKENS, NEW_TOKENS
    if config.model.positions == "learned":
        length = min(length, config.model.max_positions // 2)
        new_tokens = min(new_tokens, config.model.max_positions - length - 1)
    found = []
    for corpus in config.data.corpora:
        for record in read_records(storage, trained.manifest, corpus.name, max(BATCHES), config.run.seed):
            ids = trained.tokenizer.encode_batch([record.source], trained.tokenizer.prefix_of(record.source))[0]
            if len(ids):
                found.append(fit_source(ids, length, keeps_head(corpus)).tolist())
    return found or [[trained.tokenizer.eos_id]], new_tokens


def measured_how() -> dict[str, Any]:
    """The conditions of `figures`."""
    return {
        "prompt_tokens_at_most": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "task_records_at_most": TASK_RECORDS,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "float32 activations",
    }
