"""A checkpoint loaded for evaluation: it answers generation and likelihood requests, batched in their order."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.evaluator import Evaluator


@dataclass(frozen=True)
class EvaluatorTask:
    """What an evaluator is told: which checkpoint of which run, and where the tokenizer lies."""

    config: RunConfig
    storage_url: str
    run: str
    data_folder: str
    step: int


def load_evaluator(task: EvaluatorTask) -> Evaluator:
    """Read the verified checkpoint and the tokenizer; raises CheckpointError or DataError."""
    raise NotImplementedError
