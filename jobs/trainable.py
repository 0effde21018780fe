"""What can be prepared but not trained: checks that a run passes before it starts, and `telar prepare` does not."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig


def check_trainable(config: RunConfig) -> None:
    """Raise ConfigError when the model cannot learn from samples of the data's layout."""
    if config.model.architecture == "encoder":
        raise ConfigError(
            "model.architecture: data are prepared for models that write text, not for a classifier's labels; train "
            "an encoder_decoder or a decoder that writes the class"
        )
    if config.data.layout == "pairs" and config.model.architecture == "decoder":
        raise ConfigError(
            "data.layout: a decoder reads source and target one behind the other; set data.layout to sequence"
        )
    if config.data.layout == "sequence" and config.model.architecture == "encoder_decoder":
        raise ConfigError(
            "data.layout: samples of layout sequence have no source for the encoder of model.architecture "
            "encoder_decoder; set data.layout to pairs (and data.packing to best_fit or none)"
        )
