"""Batched generation with a cache: the most probable token each time, or sampling with a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding import start
from model.seeds import derived_seed
from model.transformer import Transformer

# Chooses the next token of each row: float32 logits [rows, vocabulary], number of each row, place -> int64 [rows].
Choose = Callable[[Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logits divided by `temperature`, then only the `top_k` most probable (0: all), of these
    the fewest that together have `top_p` of the probability (Holtzman et al. 2020).

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} must be above 0; for the most probable token use greedy")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k: {self.top_k} must be 0 or more, top_p: {self.top_p} in (0, 1]")

    def __call__(self, logits: Tensor, rows: Sequence[int], place: int) -> Tensor:
        """One token per row; the draw depends on seed, number of the row and place, not on the rows beside it."""
        ordered, tokens = (logits / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered, tokens = ordered[:, : self.top_k], tokens[:, : self.top_k]
        probabilities = ordered.double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        # A token stays while those before it have less than top_p; so the first always stays.
        kept = (cumulative - probabilities) < self.top_p
        cumulative = (probabilities * kept).cumsum(-1)
        draws = [derived_seed(self.seed, "sample", row, place) / 2.0**63 for row in rows]
        threshold = cumulative[:, -1:] * torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(1)
        chosen = (cumulative <= threshold).sum(-1, keepdim=True)
        return tokens.gather(1, chosen.clamp(max=tokens.shape[1] - 1)).squeeze(1)


def most_probable(logits: Tensor, _rows: Sequence[int], _place: int) -> Tensor:
    """The most probable token of each row."""
    return logits.argmax(-1)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """The model in evaluation mode, without gradients; as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def stream(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    bos_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    choose: Choose = most_probable,
) -> Iterator[list[tuple[int, int]]]:
    """Yields (row, token) of all rows that are not done, place by place; a stop token ends its row and is yielded.

    Rows that have ended leave the batch. Run it under `evaluating`.
    """
    if not sources or max_new_tokens < 1:
        return
    decoding, logits = start(model, sources, bos_id)
    rows = list(range(len(sources)))
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=logits.device)
    for place in range(max_new_tokens):
        tokens = choose(logits, rows, place)
        yield list(zip(rows, tokens.tolist(), strict=True))
        going_on = (~torch.isin(tokens, stops)).nonzero().squeeze(-1)
        if len(going_on) < len(rows):
            rows = [rows[i] for i in going_on.tolist()]
            tokens = tokens[going_on]
            decoding.select(going_on)
        if not rows or place + 1 == max_new_tokens:
            return
        logits = decoding.advance(tokens)


def generate(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    bos_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    choose: Choose = most_probable,
) -> list[list[int]]:
    """Outputs of all rows, each until a stop token (which is kept) or `max_new_tokens`."""
    outputs: list[list[int]] = [[] for _ in sources]
    with evaluating(model):
        for new in stream(model, sources, bos_id, stop_ids, max_new_tokens, choose):
            for row, token in new:
                outputs[row].append(token)
    return outputs


def greedy(
    model: Transformer, sources: Sequence[Sequence[int]], bos_id: int, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The most probable token at each place, per row until `eos_id` (which is kept) or `max_new_tokens`."""
    return generate(model, sources, bos_id, [eos_id], max_new_tokens)
