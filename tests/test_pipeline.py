"""Pipeline stages: how layers are cut, what is refused, where ranks stand, and what stops or ends training."""

from itertools import combinations, pairwise

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import RankResources
from configs.errors import ConfigError
from configs.schema import ModelSection, ParallelismSection
from model.balance import balanced, layer_costs, stage_names
from model.engine import create_engine
from model.mesh import Mesh
from model.transformer import build_model, parameter_shapes
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import VOCABULARY, gathered, make_config, train_on_nothing, train_with_engine


@settings(deadline=None, max_examples=150)
@given(data=st.data(), count=st.integers(1, 9))
def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it(data, count):
    costs = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    anchors = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    stages = data.draw(st.integers(1, count))
    if sum(anchors) < stages:
        with pytest.raises(ValueError, match=f"{stages} stages"):
            balanced(costs, anchors, stages)
        return
    cuts = [(0, *inner, count) for inner in combinations(range(1, count), stages - 1)]
    allowed = [cut for cut in cuts if all(any(anchors[a:b]) for a, b in pairwise(cut))]
    found = tuple(balanced(costs, anchors, stages))
    assert found in allowed

    def price(cut):
        sums = [sum(costs[a:b]) for a, b in pairwise(cut)]
        return max(sums), sum(value**2 for value in sums)

    assert price(found) == min(map(price, allowed))


def test_costs_are_twice_the_elements_that_a_token_meets():
    section = ModelSection(d_model=64, heads=4, d_ff=96, encoder_layers=2, decoder_layers=2)
    costs = layer_costs(section, 1000, 1, 1)
    shapes = parameter_shapes(section, 1000)
    for name in ("encoder_0", "decoder_1"):
        elements = sum(s[0] * s[1] for key, s in shapes.items() if key.startswith(f"{name}.") and len(s) == 2)
        # One token per side: each attention meets one key, 4 d; norms and sums one per element.
        attentions = 2 if name == "decoder_1" else 1
        assert costs[name] == 2 * elements + 4 * 64 * attentions + 64
    assert costs["head"] == 2 * 64 * 1000 + 64 and costs["embedding"] == costs["bridge"] == 64
    # The source is met by the encoder, and by keys and values of the attention over it.
    longer = layer_costs(section, 1000, 3, 1)
    assert longer["encoder_0"] > 3 * costs["encoder_0"] and longer["head"] == costs["head"]
    assert longer["decoder_0"] == costs["decoder_0"] + 2 * (2 * 2 * 64 * 64) + 2 * 4 * 64


def test_a_large_head_takes_the_place_of_layers():
    config = make_config(pipeline=2, model={"architecture": "decoder", "decoder_layers": 8})
    small, large = stage_names(config, 100), stage_names(config, 4000)
    assert [name for stage in large for name in stage] == [name for stage in small for name in stage]
    assert len(large[0]) > len(small[0]) and large[-1][-1] == "head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 2}, r"parallelism\.zero_stage: 2 does not work with pipeline = 2.*zero_stage to 1"),
        ({"zero_stage": 3}, r"parallelism\.zero_stage: 3"),
        ({"model": {"encoder_layers": 1, "architecture": "encoder"}}, r"pipeline: 2 stages .* has 1; set .* to 1"),
        ({"model": {"decoder_layers": 1, "architecture": "decoder"}}, r"pipeline: 2 stages .* has 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(pipeline=2, **changes)
    make_config(pipeline=1, **changes)
    make_config(pipeline=4)


@settings(deadline=None, max_examples=50)
@given(data=st.integers(1, 3), pipeline=st.integers(1, 4), tensor=st.integers(1, 4))
def test_stages_are_the_ranks_with_the_same_layers(data, pipeline, tensor):
    section, mesh = ParallelismSection(data=data, pipeline=pipeline, tensor=tensor), Mesh(data, pipeline, tensor)
    assert section.ranks == mesh.size == data * section.ranks_per_replica
    assert RankResources(2, 1).bundle(tensor) == {"CPU": 2 * tensor, "GPU": tensor}
    assert [rank for stage in mesh.stages() for rank in sorted(stage)] == sorted(
        range(mesh.size), key=lambda rank: (mesh.place(rank).pipeline, rank)
    )


@pytest.mark.slow
def test_a_stop_of_one_rank_is_heard_by_all_stages(gloo_pool):  # noqa: F811
    for results, _, _ in gloo_pool.run(4, train_with_engine, make_config(pipeline=2, tensor=2), 2, 3):
        assert [result.stop for result in results] == [False, False, True, False, False, False]


@pytest.mark.slow
def test_a_step_without_tokens_or_without_finite_loss_is_an_error_on_all_stages(gloo_pool):  # noqa: F811
    assert gloo_pool.run(2, train_on_nothing, make_config(pipeline=2)) == [True, True]


def start_from(config, initial):
    engine = create_engine(config, VOCABULARY, 0, initial)
    try:
        return gathered(engine), engine.parameter_count
    finally:
        engine.close()


def is_refused(config, initial):
    with pytest.raises(KeyError, match="bridge"):
        create_engine(config, VOCABULARY, 0, initial)
    dist.destroy_process_group()


@pytest.mark.slow
def test_stages_start_from_given_weights(gloo_pool):  # noqa: F811
    config = make_config(pipeline=2, tensor=2)
    weights = {name: p.detach().clone() for name, p in build_model(config.model, VOCABULARY, 99).named_parameters()}
    for found, count in gloo_pool.run(4, start_from, config, weights):
        assert found.keys() == weights.keys()
        assert all((found[name] == weights[name].numpy()).all() for name in weights)
        assert count == sum(tensor.numel() for tensor in weights.values())
    gloo_pool.run(2, is_refused, make_config(pipeline=2), {**weights, "bridge.weight": weights["embedding.weight"]})


@pytest.mark.slow
def test_less_micro_batches_than_stages_and_one_without_weight(gloo_pool):  # noqa: F811
    """3 micro-batches on two replicas: the fourth has no weight. 1 on four stages: three of them wait."""
    from tests.test_parity_matrix import trained_plainly

    for ranks, count, more in ((8, 3, {"pipeline": 2, "tensor": 2}), (4, 1, {"pipeline": 4})):
        history, expected = trained_plainly("pairs", 0.1, count)
        config = make_config(dropout=0.1, weight_decay=0.0, **more)
        for results, parameters, _ in gloo_pool.run(ranks, train_with_engine, config, count):
            for result, (loss, norm, tokens) in zip(results, history, strict=True):
                assert result.loss == pytest.approx(loss, rel=1e-5) and result.target_tokens == tokens
                assert result.grad_norm == pytest.approx(norm, rel=1e-5)
            assert all(abs(parameters[name] - value).max() < 1e-4 for name, value in expected.items())
