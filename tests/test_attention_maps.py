"""Attention maps against torch's own attention with copied weights; rollout against the paper's sums written out."""

import numpy as np
import pytest
import torch

from configs.model_section import ModelSection
from jobs.looking import looked
from jobs.report_attention import heat_map
from jobs.tasks.plausibility import plausible_measures, share_and_precision, within
from model.attention_maps import attention_maps, rollout, source_rollout
from model.transformer import build_model

SOURCE, TARGET, HEADS = 5, 4, 2


def model_of(**more):
    section = ModelSection(
        **{
            "architecture": "encoder_decoder",
            "d_model": 16,
            "heads": HEADS,
            "d_ff": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "positions": "sinusoidal",
            **more,
        }
    )
    model = build_model(section, 30, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def inputs_of(source=SOURCE, target=TARGET):
    found = []
    for length in (source, target):
        tokens = torch.arange(5, 5 + length)[None]
        found += [tokens, torch.arange(length)[None], torch.ones_like(tokens)]
    return tuple(found)


def torch_weights(attention, query, memory, causal):
    """Weights `[heads, query, key]` of torch.nn.MultiheadAttention with the parameters of ours."""
    theirs = torch.nn.MultiheadAttention(16, HEADS, batch_first=True)
    parts = [attention.query, attention.key, attention.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.weight.copy_(attention.output.weight)
        theirs.out_proj.bias.copy_(attention.output.bias)
        hidden = torch.ones(query.shape[1], memory.shape[1], dtype=torch.bool).triu(1) if causal else None
        _, weights = theirs(query, memory, memory, attn_mask=hidden, need_weights=True, average_attn_weights=False)
    return weights


def test_maps_are_those_of_torch_multihead_attention():
    model, inputs = model_of(), inputs_of()
    entered = {}

    def keep(name):
        def hook(module, arguments):
            entered[name] = arguments

        return hook

    for name in ("encoder_1", "decoder_1"):
        getattr(model, name).attention.query.register_forward_pre_hook(keep(name))
    cross = model.decoder_1.cross_attention
    cross.query.register_forward_pre_hook(keep("asking"))
    cross.key.register_forward_pre_hook(keep("memory"))
    before = model.logits(inputs)
    found = attention_maps(model, inputs)
    for name, part, causal in (("encoder_1", found.encoder, False), ("decoder_1", found.decoder, True)):
        (x,) = entered[name]
        torch.testing.assert_close(
            part[1], torch_weights(getattr(model, name).attention, x, x, causal), atol=1e-5, rtol=0
        )
    expected = torch_weights(cross, *entered["asking"], *entered["memory"], False)
    torch.testing.assert_close(found.cross[1], expected, atol=1e-5, rtol=0)
    assert torch.equal(before, model.logits(inputs)) and [len(vars(found)[k]) for k in vars(found)] == [2, 2, 2]
    assert not model.encoder_1.attention.query._forward_hooks, "hooks are taken off again"


@pytest.mark.parametrize(
    "more",
    [
        {"positions": "rotary"},
        {"key_value_heads": 1},
        {"attention": {"kind": "linear"}},
        {"attention": {"kind": "window", "window_tokens": 2}},
    ],
)
def test_maps_of_every_kind_mix_values_into_what_the_sub_layer_gives(more):
    model, inputs = model_of(**more), inputs_of()
    kept = {}
    attention = model.encoder_1.attention
    attention.value.register_forward_hook(lambda module, arguments, output: kept.update(value=output))
    attention.output.register_forward_hook(lambda module, arguments, output: kept.update(mixed=arguments[0]))
    weights = attention_maps(model, inputs).encoder[1]
    value = attention.split(kept["value"]).repeat_interleave(HEADS // attention.key_value_heads, 1)
    torch.testing.assert_close((weights @ value).transpose(1, 2).flatten(2), kept["mixed"], atol=1e-5, rtol=1e-4)


def literal_rollout(layers):
    """Section 3 of Abnar & Zuidema: each layer's A, rows divided by their sums; products of all, entry by entry."""
    size = layers[0].shape[-1]
    held = np.eye(size)
    for heads in layers:
        mean = sum(heads) / len(heads)
        a = mean + np.eye(size)
        a = a / a.sum(axis=-1, keepdims=True)
        held = np.array([[sum(a[i, k] * held[k, j] for k in range(size)) for j in range(size)] for i in range(size)])
    return held


def random_maps(layers, rows, columns, seed):
    random = np.random.default_rng(seed)
    return [random.dirichlet(np.ones(columns), size=(HEADS, rows)) for _ in range(layers)]


def test_rollout_is_the_paper_s():
    layers = random_maps(3, 6, 6, 1)
    np.testing.assert_allclose(rollout([torch.tensor(each) for each in layers]), literal_rollout(layers), atol=1e-12)


def test_rollout_to_the_source_is_that_over_one_graph_of_both_stacks():
    encoder, decoder, cross = (random_maps(2, *shape) for shape in ((5, 5, 1), (4, 4, 2), (4, 5, 3)))
    held = np.eye(9)
    for each in encoder:
        step = np.eye(9)
        step[:5, :5] = 0.5 * each.mean(0) + 0.5 * np.eye(5)
        held = step @ held
    for own, across in zip(decoder, cross, strict=True):
        step = np.eye(9)
        step[5:, 5:] = 0.5 * own.mean(0) + 0.5 * np.eye(4)
        held = step @ held
        step = np.eye(9)
        step[5:, 5:] = 0.5 * np.eye(4)
        step[5:, :5] = 0.5 * across.mean(0)
        held = step @ held
    found = source_rollout(*([torch.tensor(each) for each in part] for part in (encoder, decoder, cross)))
    np.testing.assert_allclose(found, held[5:, :5], atol=1e-12)
    assert np.allclose(held.sum(-1), 1.0)


@pytest.mark.parametrize(
    ("architecture", "names"), [("encoder_decoder", 6), ("decoder", 2), ("encoder", 2)], ids=lambda each: str(each)
)
def test_what_is_looked_at_sums_to_one_over_the_source(architecture, names):
    classes = {"labels": ("a", "b")} if architecture == "encoder" else {}
    model = model_of(architecture=architecture, **classes)
    decoder = architecture == "decoder"
    place = slice(1, 3) if decoder else slice(0, SOURCE)
    scored = torch.tensor([False, False, True, True])
    found = looked(model, inputs_of(0) if decoder else inputs_of(), place, scored)
    assert len(found["maps"]) == names and len(found["rollout"]) == place.stop - place.start
    assert sum(found["rollout"]) == pytest.approx(1.0) and min(found["rollout"]) > 0
    assert all(np.allclose(np.sum(found["maps"][n], -1), 1, atol=1e-3) for n in found["maps"] if " to " not in n)


def test_plausibility_by_hand():
    pieces = ["A ", "cat ", "sat. ", "It ", "was ", "A cat sat."]
    assert within(pieces, ["cat"]).tolist() == [False] * 5 + [True], "the last place"
    inside = within(pieces, ["It was"])
    assert inside.tolist() == [False, False, False, True, True, False]
    weights = np.array([0.1, -5.0, 0.3, 0.4, 0.0, 0.2])
    assert share_and_precision(weights, inside) == (pytest.approx(0.4), 0.5)
    assert share_and_precision(np.zeros(6), inside)[0] == pytest.approx(1 / 3)
    good = {"pieces": pieces, "attribution": inside.astype(float).tolist(), "rollout": weights.tolist()}
    lost = {"pieces": ["x"], "attribution": [1.0], "rollout": [1.0]}
    measures = {m.name: m for m in plausible_measures([good, lost], [["It was"], ["cut away"]])}
    assert measures["gradients_precision"].numerators.tolist() == [1.0, 0.0]
    assert measures["rollout_mass"].numerators.tolist() == [pytest.approx(0.4), 0.0]
    assert measures["rollout_mass"].denominators.tolist() == [1.0, 0.0]
    assert measures["rollout_mass"].baselines["random order"].tolist() == [pytest.approx(1 / 3), 0.0]
    assert plausible_measures([lost], [["cut away"]]) == []


def test_a_heat_map_draws_what_is_strong_and_escapes_words():
    drawn = heat_map("encoder", [[0.5, 0.0], [0.25, 0.25]], ["<b>", "y"], ["p", "q"])
    assert drawn.count("<title>") == 3 and 'opacity="1.00"' in drawn and 'opacity="0.50"' in drawn
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn
