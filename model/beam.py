"""Beam search with the length penalty of section 6.1 of Vaswani et al. 2017 (Wu et al. 2016, equation 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.decoding import start
from model.generation import evaluating
from model.transformer import Transformer


@dataclass(frozen=True)
class Hypothesis:
    """One output: its tokens (end token included where it has one) and its score, log P / penalty(tokens)."""

    tokens: list[int]
    score: float


@dataclass
class _Sentence:
    beams: list[list[int]]
    finished: list[Hypothesis] = field(default_factory=list)


def length_penalty(tokens: int, alpha: float) -> float:
    """((5 + tokens) / 6)^alpha."""
    return ((5.0 + tokens) / 6.0) ** alpha


def beam_search(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    bos_id: int,
    eos_id: int,
    max_new_tokens: int,
    beams: int = 4,
    alpha: float = 0.6,
) -> list[list[Hypothesis]]:
    """For each source up to `beams` hypotheses, best first.

    A sentence ends when no open beam can get a better score than the best finished hypothesis, or at
    `max_new_tokens`, where open beams count as they are. Raises ValueError for fewer than one beam.
    """
    if beams < 1:
        raise ValueError(f"beams: {beams} must be 1 or more")
    if not sources or max_new_tokens < 1:
        return [[] for _ in sources]
    with evaluating(model):
        decoding, logits = start(model, sources, bos_id)
        # All rows of a sentence stand together; at first there is one row each.
        sentences = [_Sentence([[]]) for _ in sources]
        open_sentences = list(range(len(sources)))
        scores = [torch.zeros(1, dtype=torch.float64) for _ in sources]
        for length in range(1, max_new_tokens + 1):
            log_probabilities = logits.double().log_softmax(-1).cpu()
            rows, tokens, next_open, next_scores, offset = [], [], [], [], 0
            for number, score in zip(open_sentences, scores, strict=True):
                sentence = sentences[number]
                part = log_probabilities[offset : offset + len(score)] + score.unsqueeze(1)
                chosen = _step(sentence, part, beams, eos_id, length, alpha)
                if length == max_new_tokens:
                    sentence.finished += _as_finished(chosen, length, alpha)
                elif not _is_done(sentence, chosen, max_new_tokens, alpha):
                    sentence.beams = [beam for _, beam, _ in chosen]
                    rows += [offset + row for row, _, _ in chosen]
                    tokens += [beam[-1] for _, beam, _ in chosen]
                    next_open.append(number)
                    next_scores.append(torch.tensor([value for _, _, value in chosen], dtype=torch.float64))
                offset += len(score)
            open_sentences, scores = next_open, next_scores
            if not open_sentences:
                break
            device = logits.device
            decoding.select(torch.tensor(rows, device=device))
            logits = decoding.advance(torch.tensor(tokens, device=device))
    return [sorted(sentence.finished, key=lambda found: -found.score)[:beams] for sentence in sentences]


def _step(
    sentence: _Sentence, totals: Tensor, beams: int, eos_id: int, length: int, alpha: float
) -> list[tuple[int, list[int], float]]:
    """Open beams after one more token: (row within the sentence, tokens, log P); ended ones go to `finished`.

    Of twice as many candidates as beams at most `beams` can end, so enough are left open.
    """
    vocabulary = totals.shape[1]
    best, where = totals.flatten().topk(min(2 * beams, totals.numel()))
    chosen: list[tuple[int, list[int], float]] = []
    for value, place in zip(best.tolist(), where.tolist(), strict=True):
        row, token = divmod(place, vocabulary)
        grown = [*sentence.beams[row], token]
        if token == eos_id:
            sentence.finished.append(Hypothesis(grown, value / length_penalty(length, alpha)))
        elif len(chosen) < beams:
            chosen.append((row, grown, value))
    return chosen


def _as_finished(chosen: list[tuple[int, list[int], float]], length: int, alpha: float) -> list[Hypothesis]:
    return [Hypothesis(beam, value / length_penalty(length, alpha)) for _, beam, value in chosen]


def _is_done(
    sentence: _Sentence, chosen: list[tuple[int, list[int], float]], max_new_tokens: int, alpha: float
) -> bool:
    if not chosen:
        return True
    if not sentence.finished:
        return False
    # log P only falls, and the penalty divides most at the greatest length: no beam can end better than this.
    attainable = max(value for _, _, value in chosen) / length_penalty(max_new_tokens, alpha)
    return attainable <= max(found.score for found in sentence.finished)
