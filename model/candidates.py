"""Likelihood of several continuations of one context, which is read once; each of them adds its own tokens alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding import Decoding, padded
from model.transformer import Transformer

# Logits exist for so many rows at a time, as in `token_scores`.
CHUNK_ROWS = 8

Ids = Sequence[int]


@torch.no_grad()
def candidate_scores(
    model: Transformer, contexts: Sequence[Ids], candidates: Sequence[Sequence[Ids]], bos_id: int
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each context and each of its candidates: nll in nats (float32) and most probable token, both `[labels]`.

    `contexts` are source ids, which an encoder reads, or a decoder alone after `bos_id`; `candidates` are the labels of
    each context, none of them empty. Equal to `token_scores` of whole rows but for rounding. The model is in evaluation
    mode.
    """
    decoding = Decoding(model, contexts)
    alone = model.section.architecture == "decoder"
    prompts = [[bos_id, *context] if alone else [bos_id] for context in contexts]
    device = model.embedding.weight.device
    tokens, real = padded(prompts, max(map(len, prompts)), left=True)
    ends = decoding.read(tokens.to(device), real.to(device))[:, -1:]
    owners = [number for number, group in enumerate(candidates) for _ in group]
    labels = [list(each) for group in candidates for each in group]
    of_row = torch.tensor(owners, device=device)
    longest = max(map(len, labels))
    states = ends[of_row]
    if longest > 1:
        decoding.select(of_row)
        # The last label is never read. Padding stands before the tokens, so places are counted from the end.
        tokens, real = padded([each[:-1] for each in labels], longest - 1, left=True)
        states = torch.cat((states, decoding.read(tokens.to(device), real.to(device))), 1)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(labels), CHUNK_ROWS):
        part = labels[start : start + CHUNK_ROWS]
        log_probabilities = model.head.logits(states[start : start + CHUNK_ROWS]).log_softmax(-1)
        for row, each in enumerate(part):
            tail = log_probabilities[row, longest - len(each) + 1 :]
            own = torch.cat((log_probabilities[row, :1], tail))
            label = torch.tensor(each, dtype=torch.int64, device=device)
            found.append((-own.gather(-1, label.unsqueeze(-1)).squeeze(-1), own.argmax(-1)))
    rows = iter(found)
    return [[next(rows) for _ in group] for group in candidates]
