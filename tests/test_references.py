"""torch's own layers with our weights, and what every kind of attention promises, asked of whole models by gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.attention_kinds import AttentionKind
from model.layers import DecoderLayer, SelfAttentionLayer
from model.self_attention import self_attention
from tests.test_model_transformer import copy_layer, influence, plain_inputs
from tests.test_model_variants import DECODER, KINDS, LLAMA, randomised, section, target_inputs

KEY = torch.zeros(2, dtype=torch.int64)


def with_gradients(x):
    return x.detach().clone().requires_grad_()


@settings(deadline=None, max_examples=15)
@given(
    heads=st.sampled_from([1, 2, 4]),
    pre=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    sources=st.lists(st.integers(1, 7), min_size=2, max_size=2),
    targets=st.lists(st.integers(1, 6), min_size=2, max_size=2),
)
def test_a_decoder_layer_equals_torch_s_with_gradients(heads, pre, activation, sources, targets):
    shape = section(d_model=16, heads=heads, d_ff=24, norm_placement="pre" if pre else "post", feed_forward=activation)
    layer = DecoderLayer(shape, 0, "x")
    reference = nn.TransformerDecoderLayer(16, heads, 24, 0.0, activation, batch_first=True, norm_first=pre)
    copy_layer(layer, reference)
    _, _, source_segments, _, positions, segments = plain_inputs(sources, targets)
    random = torch.Generator().manual_seed(2)
    x, memory = (torch.randn(*s.shape, 16, generator=random) for s in (segments, source_segments))
    ours, theirs = ([with_gradients(x), with_gradients(memory)] for _ in range(2))
    found = layer((*ours, source_segments, positions, segments, KEY))[0]
    expected = reference(
        *theirs,
        tgt_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
        memory_key_padding_mask=source_segments == 0,
    )
    kept = segments > 0
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=0)
    found[kept].pow(3).sum().backward()
    expected[kept].pow(3).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)
    for mine, other in (
        (layer.feed_forward.inner, reference.linear1),
        (layer.cross_attention.output, reference.multihead_attn.out_proj),
        (layer.attention_output.norm, reference.norm1),
    ):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    heads=st.sampled_from([1, 2, 8]),
    depth=st.integers(1, 3),
    pre=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_an_encoder_equals_torch_s(heads, depth, pre, lengths):
    placement = "pre" if pre else "post"
    model = randomised(section(d_model=16, heads=heads, encoder_layers=depth, norm_placement=placement))
    reference = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, heads, 48, 0.0, batch_first=True, norm_first=pre),
        depth,
        nn.LayerNorm(16) if pre else None,
        enable_nested_tensor=False,
    ).eval()
    layers = model.layers(SelfAttentionLayer)
    for ours, theirs in zip(layers, reference.layers, strict=True):
        copy_layer(ours, theirs)
    if pre:
        reference.norm.load_state_dict(model.encoder_end.norm.state_dict())
        layers = [*layers, model.encoder_end]
    tokens, positions, segments, *_ = plain_inputs(lengths, [1] * len(lengths))
    embedded = model.embedding.embed(tokens, positions, KEY)
    expected = reference(embedded, src_key_padding_mask=segments == 0)
    hidden = embedded
    for layer in layers:
        hidden = layer((hidden, positions, segments, KEY))[0]
    kept = segments > 0
    torch.testing.assert_close(hidden[kept], expected[kept], atol=1e-5, rtol=0)


def embedded_gradient(model, inputs, position):
    """Which embedded tokens `[sequence]` the output at one place of the only row depends on."""
    kept = []

    def hook(_module, _inputs, output):
        output[0].retain_grad()
        kept.append(output[0])

    handle = model.embedding.register_forward_hook(hook)
    model.hidden(inputs)[0][0, position].square().sum().backward()
    handle.remove()
    model.zero_grad()
    return kept[0].grad[0].abs().sum(-1) > 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", [DECODER, LLAMA], ids=["decoder", "llama"])
def test_a_decoder_of_every_kind_has_no_gradient_from_later_tokens_or_other_documents(architecture, kind):
    model = randomised(section(**architecture, attention=kind))
    lengths = [6, 1, 8]
    tokens = torch.randint(3, 60, (15,), generator=torch.Generator().manual_seed(0)).tolist()
    segments = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    inputs = target_inputs([[*tokens, 0]], [[*segments, 0]])
    for t, segment in enumerate(segments):
        first = segments.index(segment)
        reached = embedded_gradient(model, inputs, t)
        assert not reached[:first].any() and not reached[t + 1 :].any()
        assert reached[t]
        if kind.kind in ("full", "linear"):
            assert reached[first : t + 1].all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_an_encoder_decoder_of_every_kind_sees_no_later_target_and_no_other_pair(kind):
    model = randomised(section(attention=kind))
    source = target_inputs([[5, 9, 3, 4, 8, 11, 6]], [[1] * 4 + [2] * 3])[3:]
    target = target_inputs([[7, 3, 12, 4, 4, 9]], [[1] * 3 + [2] * 3])[3:]
    inputs = (*source, *target)
    for t in range(6):
        own, first, from_source = (1, 0, slice(0, 4)) if t < 3 else (2, 3, slice(4, 7))
        of_source, of_target = influence(model, inputs, 0, t)
        assert not of_source[0][source[2][0] != own].any() and of_source[0][from_source].all()
        assert not of_target[0, :first].any() and not of_target[0, t + 1 :].any() and of_target[0, t]


@pytest.mark.parametrize("causal", [False, True])
def test_linear_costs_grow_linearly(causal):
    """Multiplications that torch counts, at 1k to 64k tokens."""
    costs = []
    for tokens in (1024 * 4**i for i in range(4)):
        x = torch.zeros(1, 1, tokens, 4)
        segments = torch.ones(1, tokens, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            self_attention(AttentionKind("linear", causal), x, x, x, segments, torch.arange(tokens)[None])
        costs.append(counter.get_total_flops() / tokens)
    assert costs[0] > 0 and costs == [costs[0]] * 4
