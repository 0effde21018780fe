"""Every kind of attention against its dense definition, its cost, and what it must not see."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_kinds import AttentionKind, dense_attention, dense_mask
from model.block_attention import touched_blocks
from model.self_attention import self_attention

KINDS = {
    "full": AttentionKind("full"),
    "window": AttentionKind("window", window_tokens=4),
    "window with global tokens": AttentionKind("window", window_tokens=4, global_tokens=3),
    "window with more global tokens than window": AttentionKind("window", window_tokens=2, global_tokens=5),
    "blocklog": AttentionKind("blocklog", block_tokens=3),
    "linear": AttentionKind("linear"),
}


def with_causality(kind, causal):
    return AttentionKind(kind.name, causal, kind.window_tokens, kind.global_tokens, kind.block_tokens)


def packed(documents, width):
    """Segments and positions of rows of documents with these lengths, padded to `width`."""
    segments, positions = torch.zeros(len(documents), width, dtype=torch.int64), None
    positions = torch.zeros_like(segments)
    for row, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
            start += length
        positions[row, start:] = torch.arange(width - start)
    return segments, positions


def tensors(batch, width, seed=0, d=8, heads=2):
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, width, d, generator=random, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]


def gradients(out, inputs, weight):
    return torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_equals_the_dense_definition_forward_and_backward(name, causal, documents, padding, seed):
    kind = with_causality(KINDS[name], causal)
    width = max(map(sum, documents)) + padding
    segments, positions = packed(documents, width)
    inputs = tensors(len(documents), width, seed)
    out = self_attention(kind, *inputs, segments, positions)
    expected = dense_attention(kind, *inputs, dense_mask(kind, segments, positions))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for got, want in zip(gradients(out, inputs, weight), gradients(expected, inputs, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def literal_mask(kind, query, key):
    """The rules of the module's docstring, one pair of indices at a time."""
    if kind.causal and key > query:
        return False
    if kind.name == "window":
        return abs(query - key) < kind.window_tokens or key < kind.global_tokens or query < kind.global_tokens
    if kind.name == "blocklog":
        blocks = abs(query // kind.block_tokens - key // kind.block_tokens)
        return blocks in {0, 1, 2, 4, 8, 16, 32}
    return True


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", KINDS)
def test_mask_mod_says_what_the_definition_says(name, causal):
    kind = with_causality(KINDS[name], causal)
    index = torch.arange(60)
    expected = [[literal_mask(kind, query, key) for key in range(60)] for query in range(60)]
    assert kind.mask_mod(index.unsqueeze(1), index.unsqueeze(0)).tolist() == expected


@pytest.mark.parametrize("name", KINDS)
def test_no_output_depends_on_later_tokens_or_other_documents(name):
    kind = with_causality(KINDS[name], True)
    segments, positions = packed([[13, 9]], 24)
    inputs = tensors(1, 24)
    out = self_attention(kind, *inputs, segments, positions)
    for t in (0, 5, 12, 13, 20):
        for gradient in torch.autograd.grad(out[0, :, t].sum(), inputs[1:], retain_graph=True):
            reached = set((gradient[0].abs().sum((0, 2)) > 0).nonzero().squeeze(-1).tolist())
            assert reached <= set(range(0 if t < 13 else 13, t + 1))
        # The gradient of values, which came last, reaches the query's own place (a single key has no softmax gradient).
        assert t in reached


LENGTHS = [1024 * 4**i for i in range(4)]


@pytest.mark.parametrize("causal", [False, True])
def test_window_costs_grow_linearly(causal):
    kind = AttentionKind("window", causal, window_tokens=128, global_tokens=16)
    costs = [touched_blocks(kind, n) for n in LENGTHS]
    assert [cost / n for cost, n in zip(costs, LENGTHS, strict=True)] == [costs[0] / LENGTHS[0]] * len(LENGTHS)


@pytest.mark.parametrize("causal", [False, True])
def test_blocklog_costs_grow_as_n_log_n(causal):
    kind = AttentionKind("blocklog", causal, block_tokens=128)
    per_block = [touched_blocks(kind, n) * 128 / n for n in LENGTHS]
    # Four times the length adds two powers of two, on each side that is looked at.
    assert [b - a for a, b in pairwise(per_block)] == [2 if causal else 4] * 3


@pytest.mark.parametrize("bad", [{"name": "sparse"}, {"window_tokens": 0}, {"block_tokens": 0}, {"global_tokens": -1}])
def test_senseless_kinds_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if "name" not in bad else "sparse"):
        AttentionKind(**bad)
