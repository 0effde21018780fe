"""Where a model looks while it scores one target: attention maps and rollout of one source, as plain lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.attention_maps import AttentionMaps, attention_maps, rollout, source_rollout
from model.batch import Inputs
from model.transformer import Transformer

# Longer sources or targets have no heat maps: their numbers grow with the square.
MAP_TOKENS = 96
DIGITS = 4


def looked(model: Transformer, inputs: Inputs, place: slice, scored: Tensor) -> dict[str, Any]:
    """`rollout`, a share for each token of the source, and `maps`, see `jobs.tasks.base.Explain`.

    `inputs` are one row; the source stands at `place` of what its stack reads. `scored` bool `[target]` are the places
    whose labels count: rollout is the mean over them, or over all places of an encoder with a classifier, divided by
    its sum over the source.
    """
    found = attention_maps(model, inputs)
    rows = AttentionMaps(*([each[0] for each in part] for part in (found.encoder, found.decoder, found.cross)))
    maps: dict[str, Tensor] = {}
    if rows.encoder:
        maps["encoder, last layer"] = rows.encoder[-1].mean(0)
        maps["encoder, rollout"] = rollout(rows.encoder)
    if rows.decoder:
        maps["decoder, last layer"] = rows.decoder[-1].mean(0)
        maps["decoder, rollout"] = rollout(rows.decoder)
    if rows.cross:
        maps["decoder to encoder, last layer"] = rows.cross[-1].mean(0)
        maps["decoder to encoder, rollout"] = source_rollout(rows.encoder, rows.decoder, rows.cross)
        held = maps["decoder to encoder, rollout"][scored].mean(0)
    elif rows.decoder:
        held = maps["decoder, rollout"][scored].mean(0)
    else:
        held = maps["encoder, rollout"].mean(0)
    share = held[place].double()
    small = max(max(each.shape) for each in maps.values()) <= MAP_TOKENS
    return {
        "rollout": (share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)).tolist(),
        "maps": {name: _rounded(each) for name, each in maps.items()} if small else {},
    }


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in weights.double().tolist()]
