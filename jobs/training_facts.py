"""What baselines may know of the training data: n-gram counts of the very tokens trained on, and some targets."""

from __future__ import annotations

from cluster.storage import Storage
from configs.schema import RunConfig
from data.loader import consumed_targets
from data.manifest import Manifest
from data.shard_server import plain_opener
from jobs.ngrams import count
from jobs.tasks.base import TrainingFacts


def training_facts(config: RunConfig, storage: Storage, manifest: Manifest, steps: int) -> TrainingFacts:
    """Count the target tokens of steps 1 to `steps` and collect targets of corpora that need them as text."""
    opener = plain_opener(storage, manifest)
    ngrams = count(consumed_targets(manifest, config, opener, steps), manifest.vocabulary_size, manifest.bos_id)
    return TrainingFacts(ngrams, {})
