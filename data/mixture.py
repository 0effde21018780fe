"""From a manifest and a configuration to the order of samples: corpus weights and their changes become a schedule."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig
from data.manifest import Manifest
from data.order import Order
from data.schedule import Schedule


def make_order(manifest: Manifest, config: RunConfig) -> Order:
    """The order of samples of a run; raises ConfigError that names the weight or the change that has no order."""
    data = config.data
    rows = [corpus.rows for corpus in manifest.corpora]
    try:
        return Order(
            rows, make_schedule(manifest, config), config.run.seed, data.lanes, data.block_rows, data.window_blocks
        )
    except ValueError as error:
        raise ConfigError(f"data.corpora: {error} ({_names(manifest)})") from error


def make_schedule(manifest: Manifest, config: RunConfig) -> Schedule:
    """Weights of the corpora over the positions of the run, corpora in the manifest's order.

    Change i holds from position from_step x `train.global_batch_sequences` on, rounded up to a whole superblock of the
    weights before it; a change that begins where the next one does has no effect. Raises ConfigError.
    """
    names = [corpus.name for corpus in manifest.corpora]
    weights = {corpus.name: corpus.weight for corpus in manifest.corpora}
    try:
        schedule = Schedule.constant(list(weights.values()))
    except ValueError as error:
        raise ConfigError(f"data.corpora.weight: {error} ({_names(manifest)})") from error
    step = 0
    for number, change in enumerate(config.data.weight_changes):
        field = f"data.weight_changes[{number}]"
        for name in change.weights:
            if name not in weights:
                raise ConfigError(f"{field}.weights: no corpus {name!r}; corpora are {', '.join(names)}")
        if change.from_step <= step:
            raise ConfigError(
                f"{field}.from_step: {change.from_step} does not come after the entry before it ({step}); list changes "
                "by ascending step, one to a step"
            )
        step = change.from_step
        weights.update(change.weights)
        try:
            position = step * config.train.global_batch_sequences
            schedule = schedule.changed(position, list(weights.values()), config.data.lanes)
        except ValueError as error:
            raise ConfigError(f"{field}.weights: {error} ({_names(manifest)})") from error
    return schedule


def _names(manifest: Manifest) -> str:
    return "corpora in order: " + ", ".join(corpus.name for corpus in manifest.corpora)
