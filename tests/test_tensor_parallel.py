"""Tensor ranks against a plain single-process loop: replicas, ZeRO stages, dropout, variants of the model."""

import pytest

from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import assert_equal_to, make_config, train_plainly, train_with_engine

# Grouped keys and values, gates, an output projection of its own; positions by rotation.
LLAMA = {
    "architecture": "decoder",
    "positions": "rotary",
    "key_value_heads": 2,
    "feed_forward": "swiglu",
    "norm": "rms",
    "norm_placement": "pre",
    "bias": False,
}
TIED_DECODER = {"architecture": "decoder", "positions": "learned", "max_positions": 128}


def check(pool, ranks, config, count=4):
    plain = train_plainly(config, count)
    for results, parameters, number in pool.run(ranks, train_with_engine, config, count):
        assert_equal_to(plain, results, parameters)
        assert number == sum(value.size for value in parameters.values())


@pytest.mark.parametrize(
    "model", [{}, TIED_DECODER, {**LLAMA, "tie_embeddings": False}], ids=["pairs", "decoder", "llama"]
)
def test_two_tensor_ranks_equal_a_plain_loop(gloo_pool, model):  # noqa: F811
    check(gloo_pool, 2, make_config(tensor=2, model=model))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_replicas_of_two_tensor_ranks_equal_a_plain_loop(gloo_pool, zero_stage):  # noqa: F811
    check(gloo_pool, 4, make_config(tensor=2, zero_stage=zero_stage))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_replicas_share_three_micro_batches_with_dropout(gloo_pool, zero_stage):  # noqa: F811
    """One micro-batch has no weight: no token reaches the head, whose ranks exchange nothing but still agree."""
    check(gloo_pool, 4, make_config(tensor=2, zero_stage=zero_stage, dropout=0.1, model=TIED_DECODER), count=3)


@pytest.mark.slow
def test_four_tensor_ranks_equal_a_plain_loop(gloo_pool):  # noqa: F811
    check(gloo_pool, 4, make_config(tensor=4, zero_stage=3))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_other_zero_stages_without_replicas(gloo_pool, zero_stage):  # noqa: F811
    check(gloo_pool, 2, make_config(tensor=2, zero_stage=zero_stage))


@pytest.mark.parametrize("model", [{}, {**TIED_DECODER, "attention_dropout": 0.2}], ids=["outputs", "weights too"])
def test_dropout_is_that_of_one_process(gloo_pool, model):  # noqa: F811
    """Of residual outputs, the same on all tensor ranks, and of attention weights, which they share by heads."""
    config = make_config(tensor=2, dropout=0.1, model=model)
    check(gloo_pool, 2, config)
    plain, without = train_plainly(config, 4), train_plainly(make_config(model=model), 4)
    assert plain[0][0][0] != pytest.approx(without[0][0][0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_follows_fp32(gloo_pool, zero_stage):  # noqa: F811
    config = make_config(tensor=2, zero_stage=zero_stage, precision="bf16")
    history, _ = train_plainly(config, 4)
    for results, _, _ in gloo_pool.run(2, train_with_engine, config, 4):
        for result, (loss, norm, _) in zip(results, history, strict=True):
            assert result.loss == pytest.approx(loss, abs=2e-2)
            assert result.grad_norm == pytest.approx(norm, rel=5e-2)
