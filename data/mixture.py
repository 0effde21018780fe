"""The order of samples of a run, from its manifest and configuration."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig
from data.manifest import Manifest
from data.order import Order


def make_order(manifest: Manifest, config: RunConfig) -> Order:
    """The order of samples of a run; raises ConfigError when a corpus weight is too small for the mixture."""
    try:
        return Order(
            [corpus.rows for corpus in manifest.corpora],
            [corpus.weight for corpus in manifest.corpora],
            config.run.seed,
            config.data.lanes,
            config.data.block_rows,
            config.data.window_blocks,
        )
    except ValueError as error:
        names = ", ".join(corpus.name for corpus in manifest.corpora)
        raise ConfigError(f"data.corpora.weight: {error} (corpora in order: {names})") from error
