"""Candidates that share a context score as whole rows do, for all architectures and kinds of attention."""

import numpy as np
import pytest
import torch

from data.tokenizer import Tokenizer
from jobs import answers
from jobs.tasks.base import Choices
from model.candidates import candidate_scores
from model.transformer import build_model
from tests.test_decoding import BOS, PROMPTS, whole_pass
from tests.test_harness import LLAMA as HARNESS_LLAMA
from tests.test_harness import MARIAN, config_of
from tests.test_model_variants import DECODER, KINDS, LLAMA, randomised, section

# One label alone, many of unlike length, equal ones, and a single candidate.
CANDIDATES = [[[4], [9, 2]], [[5, 6, 7, 8, 2], [5, 2], [3, 3, 2]], [[2], [2]], [[11, 4, 2]]]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", [{}, DECODER, LLAMA], ids=["encoder_decoder", "decoder", "llama"])
def test_shared_contexts_score_as_whole_rows(architecture, kind):
    model = randomised(section(**architecture, attention=kind)).eval()
    found = candidate_scores(model, PROMPTS, CANDIDATES, BOS)
    check(model, found, PROMPTS, CANDIDATES)


@pytest.mark.parametrize("labels", [[[4], [7]], [[4], [7, 2]]], ids=["one label each", "one and two"])
def test_short_candidates(labels):
    model = randomised(section(**LLAMA)).eval()
    check(model, candidate_scores(model, PROMPTS[:1], [labels], BOS), PROMPTS[:1], [labels])


@torch.no_grad()
def check(model, found, contexts, candidates):
    assert [len(group) for group in found] == [len(group) for group in candidates]
    for context, scored, group in zip(contexts, found, candidates, strict=True):
        for (nll, best), labels in zip(scored, group, strict=True):
            logits = whole_pass(model, context, labels[:-1])
            expected = -logits.log_softmax(-1)[range(len(labels)), labels]
            torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
            assert best.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("layout", ["pairs", "sequence"])
def test_answers_to_choices_are_those_of_one_candidate_at_a_time(layout, monkeypatch):
    config = config_of(model=HARNESS_LLAMA if layout == "sequence" else MARIAN)
    tokenizer = Tokenizer.train(["red green blue of the sky"] * 3, 300)
    built = build_model(config.model, tokenizer.vocabulary_size, 5).eval()
    model_answers = answers.ModelAnswers(built, tokenizer, config)
    sources = ["the sky of the sky is of", "red", "green and blue of red of the"]
    requests = [Choices(source, (" red", " green of the sky", "")) for source in sources]
    shared = model_answers.answer("prose", requests, 4)
    calls = []
    monkeypatch.setattr(answers, "SHARED_TOKENS", 10_000)
    monkeypatch.setattr(answers, "candidate_scores", lambda *given: calls.append(given))
    alone = model_answers.answer("prose", requests, 4)
    assert not calls
    for one, other in zip(shared, alone, strict=True):
        assert one["tokens"] == other["tokens"] and one["bytes"] == other["bytes"]
        np.testing.assert_allclose(one["nll"], other["nll"], atol=2e-5)
