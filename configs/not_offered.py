"""Ways of sharing work that other systems have and this one has not: refused by name, with what to use instead."""

from __future__ import annotations

NOT_OFFERED = {
    "tensor_engine": "tensor ranks use Telar's own layers, which work with stages and at ZeRO 1, 2 and 3, and whose "
    "checkpoints load at any shape; DeepSpeed's AutoTP works without stages only. Remove it and set "
    "parallelism.tensor",
    "sequence": "one rank holds a whole sequence: sharing one between ranks (Ulysses) is not built. Remove it; longer "
    "sequences fit with train.activation_checkpointing, parallelism.tensor, or model.attention.kind window or linear",
    "pipeline_schedule": "stages run one forward, one backward in turn; DualPipeV is not built. Remove it; more "
    "micro-batches in a step make the bubble smaller",
    "expert": "there are no mixtures of experts. Remove it",
    "context": "one rank holds a whole sequence: context parallelism is not built. Remove it; longer sequences fit "
    "with train.activation_checkpointing, parallelism.tensor, or model.attention.kind window or linear",
}


def refuse_not_offered(section: object) -> object:
    """For a validator of the section before its fields are read: raises ValueError naming the first such field."""
    if isinstance(section, dict):
        for name, reason in NOT_OFFERED.items():
            if name in section:
                raise ValueError(f"{name}: {reason}")
    return section
