"""What can be prepared but not trained: checks that a run passes before it starts, and `telar prepare` does not."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig


def check_trainable(config: RunConfig) -> None:
    """Raise ConfigError when the model cannot read samples of the data's layout."""
    if config.data.layout == "sequence" and config.model.architecture == "encoder_decoder":
        raise ConfigError(
            "data.layout: samples of layout sequence have no source for the encoder of model.architecture "
            "encoder_decoder; set data.layout to pairs (and data.packing to best_fit or none)"
        )
