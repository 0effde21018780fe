"""Pruning against references: masked full models, finite differences of gates, naive loops for masks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from configs.errors import ConfigError
from model.batch import ModelBatch
from model.export import export
from model.generation import greedy
from model.prune import Kept, choose, cut, importance, parts, pruned_section
from model.sparsify import input_norms, magnitude_mask, pattern_mask, sparsify, wanda_mask
from model.transformer import build_model
from tests.test_engine import VOCABULARY
from tests.test_export import TOKENS, written
from tests.test_model_transformer import plain_inputs
from tests.test_model_variants import DECODER, LLAMA, randomised, section

SECTIONS = {
    "encoder-decoder": section(),
    "pre-norm, GELU": section(norm_placement="pre", feed_forward="gelu"),
    "decoder": section(**DECODER),
    "llama with shared keys": section(**LLAMA),
}


def batch(seed=0):
    inputs = plain_inputs([7, 4, 2], [6, 3, 5], seed)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCABULARY, inputs[3].shape, generator=random)
    return ModelBatch(0, inputs, labels, (inputs[5] > 0).float())


def some_kept(model, groups=1, units=24):
    random = torch.Generator().manual_seed(3)
    attentions, feed_forwards = parts(model)

    def chosen(of, count):
        return torch.randperm(of, generator=random)[:count].sort().values

    return Kept(
        {name: chosen(model.section.heads_of_keys, groups) for name in attentions},
        {name: chosen(model.section.d_ff, units) for name in feed_forwards},
    )


def masked(model, kept):
    """The full model with zeros where what was cut out meets the output projection."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, groups in kept.groups.items():
            output = result.get_submodule(name).output.weight
            width = output.shape[1] // model.section.heads_of_keys
            for group in set(range(model.section.heads_of_keys)) - set(groups.tolist()):
                output[:, group * width : (group + 1) * width] = 0
        for name, units in kept.units.items():
            outer = result.get_submodule(name).outer.weight
            for unit in set(range(model.section.d_ff)) - set(units.tolist()):
                outer[:, unit] = 0
    return result


def pruned(model, kept):
    smaller = pruned_section(model.section, kept)
    result = build_model(smaller, VOCABULARY, 0).eval()
    result.load(cut(dict(model.named_parameters()), model.section, kept))
    return result


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_cutting_out_equals_masking(name):
    model = randomised(SECTIONS[name])
    kept = some_kept(model)
    smaller, full = pruned(model, kept), masked(model, kept)
    inputs = batch().inputs
    real = inputs[5] > 0
    torch.testing.assert_close(smaller.logits(inputs)[real], full.logits(inputs)[real], atol=1e-5, rtol=1e-5)
    sources = [[5, 9, 4], [7]]
    assert greedy(smaller, sources, 1, 2, 6) == greedy(full, sources, 1, 2, 6)
    assert smaller.section.heads < model.section.heads and smaller.section.d_ff == 24
    numbers = [sum(p.numel() for p in m.parameters()) for m in (smaller, full)]
    assert numbers[0] < 0.8 * numbers[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_importance_is_the_slope_of_the_loss(name):
    model = randomised(SECTIONS[name]).double()
    for tensor in model.parameters():
        assert tensor.dtype == torch.float64
    batches = [batch(0), batch(1)]
    found = importance(model, batches)

    def loss(each):
        with torch.no_grad():
            scores = model.logits(each.inputs).double().log_softmax(-1)
            nll = -scores.gather(-1, each.labels.unsqueeze(-1)).squeeze(-1)
            return float((nll * each.loss_weight).sum() / each.loss_weight.sum())

    def slopes(weight, columns):
        total = 0.0
        for each in batches:
            values = []
            for factor in (1 + 1e-3, 1 - 1e-3):
                kept = weight.data.clone()
                weight.data[:, columns] *= factor
                values.append(loss(each))
                weight.data.copy_(kept)
            total += abs(values[0] - values[1]) / 2e-3
        return total

    attentions, feed_forwards = parts(model)
    for attention in list(attentions)[:2]:
        output = model.get_submodule(attention).output.weight
        width = output.shape[1] // model.section.heads_of_keys
        for group in range(model.section.heads_of_keys):
            expected = slopes(output, slice(group * width, (group + 1) * width))
            assert float(found[attention][group]) == pytest.approx(expected, rel=0.02, abs=1e-3)
    layer = next(iter(feed_forwards))
    for unit in (0, 5, 11):
        expected = slopes(model.get_submodule(layer).outer.weight, slice(unit, unit + 1))
        assert float(found[layer][unit]) == pytest.approx(expected, rel=0.02, abs=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_most_important_stay_in_every_layer():
    model = randomised(section())
    attentions, feed_forwards = parts(model)
    importances = {name: torch.tensor([0.1, 3.0, 2.0, 0.5]) for name in attentions}
    importances |= {name: torch.arange(48.0) for name in feed_forwards}
    kept = choose(model, importances, 0.5)
    assert all(groups.tolist() == [1, 2] for groups in kept.groups.values())
    assert all(units.tolist() == list(range(24, 48)) for units in kept.units.values())
    assert len(kept.groups) == 8 and len(kept.units) == 5
    few = choose(model, importances, 0.99)
    assert {len(groups) for groups in few.groups.values()} == {1} and {len(u) for u in few.units.values()} == {8}
    smaller = pruned_section(model.section, kept)
    assert (smaller.heads, smaller.head_width, smaller.d_ff, smaller.d_model) == (2, 8, 24, 32)


def test_moments_are_cut_like_weights():
    model = randomised(section())
    kept = some_kept(model, groups=2)
    weights = dict(model.named_parameters())
    numbered = {name: torch.arange(p.numel(), dtype=torch.float32).view_as(p) for name, p in weights.items()}
    of_numbers = cut(numbered, model.section, kept)
    for name, tensor in cut(weights, model.section, kept).items():
        assert torch.equal(tensor, weights[name].flatten()[of_numbers[name].long()])


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder-decoder", "decoder", "llama with shared keys"])
def test_a_pruned_model_is_exported(tmp_path, name):
    model = randomised(SECTIONS[name])
    smaller = pruned(model, some_kept(model))
    inputs = batch().inputs
    real = inputs[5] > 0
    theirs = written(smaller, tmp_path)
    if name == "encoder-decoder":
        # Sources that are padded as transformers pads them.
        expected = theirs(input_ids=inputs[0], attention_mask=inputs[2], decoder_input_ids=inputs[3]).logits
    else:
        expected = theirs(input_ids=inputs[3], attention_mask=inputs[5]).logits
    torch.testing.assert_close(smaller.logits(inputs)[real], expected[real], atol=1e-5, rtol=1e-5)


def test_shared_keys_are_refused_by_opt_pruned_or_not():
    model = randomised(section(**{**DECODER, "key_value_heads": 2}))
    smaller = pruned(model, some_kept(model))
    with pytest.raises(ConfigError, match="key_value_heads"):
        export(smaller.section, dict(smaller.named_parameters()), VOCABULARY, TOKENS, positions=16)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 24), amount=st.floats(0.05, 0.95), seed=st.integers(0, 10**6))
def test_wanda_is_a_loop_over_rows(rows, columns, amount, seed):
    random = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(rows, columns, generator=random), torch.rand(columns, generator=random)
    mask = wanda_mask(weight, norms, amount)
    for i in range(rows):
        scores = [(abs(float(weight[i, j])) * float(norms[j]), j) for j in range(columns)]
        removed = {j for _, j in sorted(scores)[: round(columns * amount)]}
        assert {j for j in range(columns) if not mask[i, j]} == removed


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 24), amount=st.floats(0.05, 0.95), seed=st.integers(0, 999))
def test_magnitude_removes_the_smallest_of_the_matrix(rows, columns, amount, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = magnitude_mask(weight, amount)
    ordered = sorted(weight.abs().flatten().tolist())
    count = round(rows * columns * amount)
    assert sorted(weight[~mask].abs().tolist()) == ordered[:count]


def test_two_of_four_neighbours_stay():
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    mask = pattern_mask(score)
    for i in range(6):
        for start in range(0, 16, 4):
            four = score[i, start : start + 4].tolist()
            assert [j for j in range(4) if mask[i, start + j]] == sorted(sorted(range(4), key=lambda j: -four[j])[:2])


@torch.no_grad()
def test_norms_count_real_tokens_of_the_right_side():
    model, each = randomised(section()), batch()
    names = ["encoder_1.feed_forward.inner", "decoder_0.cross_attention.key", "decoder_1.attention.query"]
    found = input_norms(model, {name: model.get_submodule(name) for name in names}, [each, each])
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, x, _y, name=name: seen.update({name: x[0]}))
        for name in names
    ]
    model.hidden(each.inputs)
    for hook in hooks:
        hook.remove()
    for name, segments in zip(names, (each.inputs[2], each.inputs[2], each.inputs[5]), strict=True):
        total = torch.zeros(32)
        for row in range(len(segments)):
            for place in range(segments.shape[1]):
                if segments[row, place] > 0:
                    total += 2 * seen[name][row, place] ** 2
        torch.testing.assert_close(found[name], total.sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [False, True])
def test_half_of_every_linear_layer_becomes_zero(method, pattern):
    model = randomised(section())
    before = {name: p.clone() for name, p in model.named_parameters()}
    sparsify(model, method, 0.5, pattern, [batch()])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if name not in linear:
            assert torch.equal(parameter, before[name])
            continue
        kept = parameter != 0
        assert float(kept.float().mean()) == 0.5
        assert torch.equal(parameter[kept], before[name][kept])
        if pattern:
            assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@torch.no_grad()
def test_wanda_sees_layers_behind_as_already_pruned():
    model, each = randomised(section()), batch()
    expected = copy.deepcopy(model)
    for number in range(2):
        layer = f"encoder_{number}"
        linears = {
            f"{layer}.{name}": m
            for name, m in expected.get_submodule(layer).named_modules()
            if isinstance(m, nn.Linear)
        }
        norms = input_norms(expected, linears, [each])
        for name, linear in linears.items():
            linear.weight *= wanda_mask(linear.weight, norms[name], 0.5)
    sparsify(model, "wanda", 0.5, batches=[each])
    for name, parameter in expected.named_parameters():
        if name.startswith("encoder_"):
            assert torch.equal(model.get_parameter(name), parameter)


def test_wanda_beats_magnitude_where_inputs_differ_in_size():
    """The case the paper names: few input features are much larger than the others."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=random)
    x = torch.randn(500, 128, generator=random) * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=random)]
    exact = x @ weight.T
    errors = [
        (x @ (weight * mask).T - exact).norm() / exact.norm()
        for mask in (wanda_mask(weight, x.norm(dim=0), 0.5), magnitude_mask(weight, 0.5))
    ]
    assert errors[0] < 0.6 * errors[1]
