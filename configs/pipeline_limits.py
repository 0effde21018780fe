"""What cannot be cut into pipeline stages, and what to do instead."""

from __future__ import annotations

from configs.model_section import ModelSection


def pipeline_problem(stages: int, zero_stage: int, model: ModelSection) -> str | None:
    """Why `stages` of this model cannot be trained, naming the field and the fix; None: they can."""
    if stages == 1:
        return None
    if zero_stage > 1:
        return (
            f"parallelism.zero_stage: {zero_stage} does not work with pipeline = {stages}: stages keep gradients and "
            "parameters until the whole batch has passed; set parallelism.zero_stage to 1 or parallelism.pipeline to 1"
        )
    layers = layers_of(model)
    if stages > layers:
        return (
            f"parallelism.pipeline: {stages} stages need a layer each, the model has {layers}; set "
            f"parallelism.pipeline to {layers} or fewer"
        )
    return None


def layers_of(model: ModelSection) -> int:
    """Encoder and decoder layers that the architecture has."""
    encoder = 0 if model.architecture == "decoder" else model.encoder_layers
    decoder = 0 if model.architecture == "encoder" else model.decoder_layers
    return encoder + decoder
