"""What can be prepared but not trained: checks that a run passes before it starts, and `telar prepare` does not."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig


def check_trainable(config: RunConfig) -> None:
    """Raise ConfigError when the model cannot learn from samples of the data's layout."""
    if config.model.architecture == "encoder":
        _check_classifier(config)
    if config.data.layout == "pairs" and config.model.architecture == "decoder":
        raise ConfigError(
            "data.layout: a decoder reads source and target one behind the other; set data.layout to sequence"
        )
    if config.data.layout == "sequence" and config.model.architecture == "encoder_decoder":
        raise ConfigError(
            "data.layout: samples of layout sequence have no source for the encoder of model.architecture "
            "encoder_decoder; set data.layout to pairs (and data.packing to best_fit or none)"
        )


def _check_classifier(config: RunConfig) -> None:
    """Raise ConfigError when pairs do not have classes as targets, or something would ask the model to write."""
    if not config.model.labels:
        raise ConfigError(
            "model.labels: an encoder classifies; name the targets that stand for its classes, as [negative, positive]"
        )
    if config.data.layout != "pairs":
        raise ConfigError("data.layout: an encoder reads sources alone; set data.layout to pairs")
    for corpus in config.data.corpora:
        if corpus.task != "sentiment":
            raise ConfigError(
                f"data.corpora.{corpus.name}.task: {corpus.task} asks for text, which an encoder does not write; set "
                "sentiment, which asks for the likeliest label"
            )
    for task in config.evaluate.definitions:
        if task.request not in ("choices", "explain"):
            raise ConfigError(
                f"evaluate.definitions.{task.name}.request: {task.request} asks for text, which an encoder does not "
                "write; leave the task out"
            )
