"""What the training software does that decides memory and time, apart from the layout.

Telar's own entries say what its code does now. Published runs were made by other software, whose entries
`published.yaml` gives, so that predictions are compared with like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, ValidationError

from configs.errors import ConfigError
from configs.load import read_yaml
from configs.schema import RunConfig
from configs.section import PositiveInt, Section


class Techniques(Section):
    """Ways of computing the same numbers. The defaults are Telar's."""

    attention: Literal["flash", "masked", "unfused"] = Field(
        "masked",
        description="flash: half of the scores of a causal mask are never computed; masked: one kernel under a given "
        "mask, which computes all; unfused: scores are written to memory",
    )
    elementwise: Literal["fused", "eager"] = Field(
        "eager", description="whether neighbouring operations on single elements share one pass over memory"
    )
    recompute: Literal["none", "full"] = Field("none", description="full: each layer's activations are computed twice")
    sequence_parallel: bool = Field(
        False, description="norms and residuals are split over tensor ranks too (Korthikanti et al. 2022)"
    )
    interleave: PositiveInt = Field(1, description="chunks of layers per pipeline rank (Narayanan et al. 2021, 2.2)")
    overlap: bool = Field(False, description="data-parallel communication runs beside the backward pass")
    gradient_bytes: Literal[2, 4] = Field(4, description="bytes per gradient that is communicated")


def techniques_of(config: RunConfig) -> Techniques:
    """What Telar does under this configuration."""
    return Techniques(recompute="full" if config.train.activation_checkpointing else "none")


def with_assumptions(techniques: Techniques, assumed: Sequence[str]) -> Techniques:
    """`techniques` with `name=value` entries changed; raises ConfigError that names what can be assumed."""
    fields = techniques.model_dump()
    for text in assumed:
        name, separator, value = text.partition("=")
        if not separator or name not in fields:
            raise ConfigError(f"--assume {text}: must be NAME=VALUE with NAME one of {', '.join(fields)}")
        fields[name] = read_yaml(value)
        try:
            Techniques.model_validate(fields)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise ConfigError(f"--assume {text}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from error
    return Techniques.model_validate(fields)
