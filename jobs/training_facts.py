"""What baselines may know of the training data: n-gram counts of the very tokens trained on, and some targets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.storage import Storage
from configs.schema import RunConfig
from data.loader import consumed_pairs
from data.manifest import Manifest
from data.shard_server import plain_opener
from data.tokenizer import read_tokenizer
from jobs.ngrams import count
from jobs.tasks.base import TrainingFacts

TARGETS_KEPT = 20_000
# Tasks with a constant answer among their baselines.
TASKS_WITH_TARGETS = ("summary", "sentiment", "qa")


def training_facts(config: RunConfig, storage: Storage, manifest: Manifest, steps: int) -> TrainingFacts:
    """Count the target tokens of steps 1 to `steps`, and keep the first 20,000 targets of some corpora as text.

    These are the corpora whose task has baselines made of targets.

    A target is kept as often as it was trained on; of one that was cut in pieces only the last piece is.
    """
    tokenizer = read_tokenizer(storage, manifest)
    kept: dict[str, list[np.ndarray]] = {c.name: [] for c in config.data.corpora if c.task in TASKS_WITH_TARGETS}

    def labels() -> Iterator[np.ndarray]:
        for corpus, sequence in consumed_pairs(manifest, config, plain_opener(storage, manifest), steps):
            targets = kept.get(corpus)
            if targets is not None and len(targets) < TARGETS_KEPT and sequence[-1] == manifest.eos_id:
                targets.append(sequence)
            yield sequence

    ngrams = count(labels(), manifest.vocabulary_size, manifest.bos_id)
    texts: dict[bytes, str] = {}
    for sequences in kept.values():
        for sequence in sequences:
            key = sequence.tobytes()
            if key not in texts:
                texts[key] = tokenizer.decode(sequence)
    targets = {corpus: [texts[s.tobytes()] for s in sequences] for corpus, sequences in kept.items()}
    return TrainingFacts(ngrams, targets)
