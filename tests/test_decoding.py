"""Cached decoding of all architectures and kinds, sampling, and beam search against exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import AttentionSection
from model.beam import beam_search, length_penalty
from model.decoding import LIKE, SHORT, of_like_length, start
from model.generation import Sampling, evaluating, generate, greedy, stream
from tests.test_model_variants import DECODER, KINDS, LLAMA, randomised, section, target_inputs

BOS, EOS = 1, 2
PROMPTS = [[5, 9, 3, 4, 8], [7], [], [11, 6, 3]]


def whole_pass(model, source, output):
    """Logits `[len(output) + 1, vocabulary]` without a cache."""
    if model.section.architecture == "decoder":
        inputs = target_inputs([[BOS, *source, *output]])
        return model.logits(inputs)[0, len(source) :]
    inputs = target_inputs([[BOS, *output]])
    row = torch.tensor([source], dtype=torch.int64).view(1, -1)
    return model.logits((row, torch.arange(row.shape[1])[None], torch.ones_like(row), *inputs[3:]))[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", [{}, DECODER, LLAMA], ids=["encoder_decoder", "decoder", "llama"])
def test_cached_logits_equal_the_whole_pass(architecture, kind):
    model = randomised(section(**architecture, attention=kind))
    random = torch.Generator().manual_seed(0)
    outputs = torch.randint(3, 20, (4, 6), generator=random)
    with torch.no_grad():
        decoding, logits = start(model, PROMPTS, BOS)
        found = [logits] + [decoding.advance(outputs[:, i]) for i in range(6)]
    found = torch.stack(found, 1)
    for row, prompt in enumerate(PROMPTS):
        expected = whole_pass(model, prompt, outputs[row].tolist())
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", [DECODER, LLAMA], ids=["decoder", "llama"])
def test_prompts_of_unlike_length_are_read_apart_and_go_on_together(architecture, kind):
    model, random = randomised(section(**architecture, attention=kind)), torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 20, (n,), generator=random).tolist() for n in (3, 40, 22, 0, 39, 21, 38)]
    outputs, fed = torch.randint(3, 20, (len(prompts), 3), generator=random), []
    hook = model.decoder_0.feed_forward.register_forward_hook(lambda _m, inputs, _o: fed.append(inputs[0].shape[:2]))
    with torch.no_grad():
        decoding, logits = start(model, prompts, BOS)
        found = torch.stack([logits] + [decoding.advance(outputs[:, i]) for i in range(3)], 1)
    hook.remove()
    assert [tuple(shape) for shape in fed] == [(3, 41), (2, 23), (2, 4)] + [(7, 1)] * 3
    for row, prompt in enumerate(prompts):
        expected = whole_pass(model, prompt, outputs[row].tolist())
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_groups_of_prompts_hold_every_row_once_and_little_padding(lengths):
    groups = of_like_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[row] for row in group]
        assert max(own) <= SHORT or min(own) >= LIKE * max(own)


def test_cost_does_not_depend_on_what_was_written_before():
    model, seen = randomised(section(**DECODER)), []
    hook = model.decoder_0.feed_forward.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[:2]))
    generate(model, PROMPTS, BOS, [], 5)
    hook.remove()
    # The prompts with bos once, then a position a row for each token but the last, which nothing follows.
    assert [tuple(shape) for shape in seen] == [(4, 6)] + [(4, 1)] * 4


def test_streamed_tokens_are_those_that_generate_returns():
    model = randomised(section(**DECODER))
    endless = generate(model, PROMPTS, BOS, [], 8)
    stop = endless[0][3]
    outputs = [[] for _ in PROMPTS]
    with evaluating(model):
        for new in stream(model, PROMPTS, BOS, [stop], 8):
            for row, token in new:
                outputs[row].append(token)
    assert outputs == generate(model, PROMPTS, BOS, [stop], 8)
    for output, free in zip(outputs, endless, strict=True):
        assert output == (free[: free.index(stop) + 1] if stop in free else free)
    assert generate(model, PROMPTS, BOS, [stop], 0) == [[]] * 4


def test_a_sample_does_not_depend_on_the_rows_beside_it():
    model = randomised(section(**DECODER))
    together = generate(model, PROMPTS, BOS, [], 6, Sampling(seed=3))
    assert generate(model, PROMPTS[:1], BOS, [], 6, Sampling(seed=3))[0] == together[0]
    assert generate(model, PROMPTS, BOS, [], 6, Sampling(seed=4)) != together
    assert generate(model, PROMPTS, BOS, [], 6, Sampling(top_k=1)) == greedy(model, PROMPTS, BOS, -1, 6)
    assert generate(model, PROMPTS, BOS, [], 6, Sampling(top_p=1e-9)) == greedy(model, PROMPTS, BOS, -1, 6)


@settings(max_examples=25, deadline=None)
@given(
    logits=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=6),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_samples_have_the_probabilities_of_the_definition(logits, temperature, top_k, top_p):
    draws = 3000
    row = torch.tensor(logits)
    logits = row.tolist()
    tokens = Sampling(temperature, top_k, top_p, seed=1)(row.repeat(draws, 1), range(draws), 0)
    probabilities = (row.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept, total = [], 0.0
    whole = sum(probabilities[i] for i in order[: top_k or None])
    for i in order[: top_k or None]:
        if total / whole < top_p:
            kept.append(i)
            total += probabilities[i]
    counts = torch.bincount(tokens, minlength=len(logits)).double() / draws
    for i in range(len(logits)):
        expected = probabilities[i] / total if i in kept else 0.0
        # Five standard deviations of a share of 3,000 draws.
        assert abs(counts[i].item() - expected) <= 5 * (0.25 / draws) ** 0.5
        assert counts[i] == 0 or i in kept


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_senseless_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def exhaustive(model, source, vocabulary, most, alpha):
    """All outputs that end with EOS, or have `most` tokens, best first."""
    found = []
    for length in range(1, most + 1):
        for output in itertools.product(range(vocabulary), repeat=length):
            if EOS in output[:-1] or (output[-1] != EOS and length < most):
                continue
            log_probabilities = whole_pass(model, source, list(output[:-1])).double().log_softmax(-1)
            total = sum(log_probabilities[i, token].item() for i, token in enumerate(output))
            found.append((total / length_penalty(length, alpha), list(output)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("architecture", [{}, DECODER], ids=["encoder_decoder", "decoder"])
def test_wide_beams_equal_exhaustive_search(architecture, alpha):
    vocabulary, most = 5, 3
    model = randomised(section(**architecture), vocabulary=vocabulary, spread=0.4)
    sources = [[3, 4, 3], [4]]
    # With as many beams as there are open outputs nothing is cut off.
    found = beam_search(model, sources, BOS, EOS, most, beams=4**2, alpha=alpha)
    with torch.no_grad():
        for source, hypotheses in zip(sources, found, strict=True):
            best = exhaustive(model, source, vocabulary, most, alpha)
            assert hypotheses[0].tokens == best[0][1]
            assert hypotheses[0].score == pytest.approx(best[0][0], abs=1e-5)
            scores = {tuple(tokens): score for score, tokens in best}
            assert all(scores[tuple(h.tokens)] == pytest.approx(h.score, abs=1e-5) for h in hypotheses)


def test_one_beam_is_greedy_and_more_beams_never_score_worse():
    model = randomised(section(**DECODER))
    for beams in (1, 3):
        found = beam_search(model, PROMPTS, BOS, EOS, 6, beams=beams, alpha=0.0)
        if beams == 1:
            assert [h[0].tokens for h in found] == greedy(model, PROMPTS, BOS, EOS, 6)
            first = found
        assert all(a[0].score <= b[0].score + 1e-9 for a, b in zip(first, found, strict=True))
    with pytest.raises(ValueError, match="beams"):
        beam_search(model, PROMPTS, BOS, EOS, 6, beams=0)


def test_sentences_of_a_batch_do_not_disturb_each_other():
    model = randomised(section(attention=AttentionSection(kind="window", window_tokens=2)))
    together = beam_search(model, PROMPTS, BOS, EOS, 6, beams=3)
    alone = [beam_search(model, [prompt], BOS, EOS, 6, beams=3)[0] for prompt in PROMPTS]
    assert [[h.tokens for h in row] for row in together] == [[h.tokens for h in row] for row in alone]
