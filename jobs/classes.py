"""Targets as classes: what an encoder with a classification head learns from pairs whose targets are labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.errors import DataError
from data.tokenizer import Tokenizer
from model.batch import ModelBatch


class Classes:
    """The class of each label text, by the tokens that prepared data hold for it."""

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer) -> None:
        """`labels` are `model.labels`, in the order of the classes; raises DataError for two that are written alike."""
        self._tokenizer = tokenizer
        self._classes: dict[tuple[int, ...], int] = {}
        for number, ids in enumerate(tokenizer.encode_batch(list(labels))):
            known = self._classes.setdefault((*ids.tolist(), tokenizer.eos_id), number)
            if known != number:
                raise DataError(
                    f"model.labels: {labels[known]!r} and {labels[number]!r} are the same tokens; choose other words"
                )

    def of(self, labels: Sequence[int]) -> int:
        """The class of a target's tokens, eos included; raises DataError for one that is none of the labels."""
        found = self._classes.get(tuple(labels))
        if found is None:
            raise DataError(
                f"model.labels: the target {self._tokenizer.decode(labels)!r} is none of them; add it, or let the "
                "corpus's target template give one of them"
            )
        return found

    def batch(self, batch: ModelBatch) -> ModelBatch:
        """The same sources with one target position `[batch, pairs]` for each pair; its label is the pair's class.

        Its weight is that of the target's first token, so a pair counts once however long its label is written.
        """
        *source, _, _, segments = batch.inputs
        pairs = max(1, int(segments.max())) if segments.numel() else 1
        shape = (segments.shape[0], pairs)
        targets, classes = torch.zeros(shape, dtype=segments.dtype), torch.zeros(shape, dtype=torch.int64)
        weight = torch.zeros(shape)
        for row in range(shape[0]):
            for pair in range(1, int(segments[row].max() if segments.numel() else 0) + 1):
                place = (segments[row] == pair).nonzero().squeeze(-1)
                if len(place):
                    targets[row, pair - 1] = pair
                    classes[row, pair - 1] = self.of(batch.labels[row, place].tolist())
                    weight[row, pair - 1] = batch.loss_weight[row, place[0]]
        nothing = torch.zeros_like(targets)
        return ModelBatch(batch.index, (*source, nothing.long(), nothing, targets), classes, weight)
