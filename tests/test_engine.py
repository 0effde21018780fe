"""The engine against a plain single-process PyTorch loop: every ZeRO stage, uneven micro-batches, dropout, stop."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import RunConfig
from model.batch import ModelBatch
from model.deepspeed_config import deepspeed_config
from model.engine import create_engine
from model.step import TrainingError
from model.transformer import build_model
from tests.gloo_pool import GlooPool, gloo_pool  # noqa: F401

VOCABULARY = 61
STEPS = 6
RATE = 3e-3


def make_config(
    dropout=0.0,
    zero_stage=1,
    precision="fp32",
    clipping=0.5,
    weight_decay=0.01,
    tensor=1,
    pipeline=1,
    model=None,
    **run,
) -> RunConfig:
    return parse_config(
        {
            # A seed for which no ReLU stands so close to 0 that rounding decides: float64 agrees to 1e-6 in each step.
            "run": {"seed": 12, **run},
            "cluster": {"device": "cpu"},
            "data": {"corpora": [{"name": "none", "kind": "text", "path": "/nowhere", "target": "{text}"}]},
            "model": {
                "d_model": 32,
                "heads": 4,
                "d_ff": 48,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "dropout": dropout,
                **(model or {}),
            },
            "parallelism": {"data": 1, "pipeline": pipeline, "tensor": tensor, "zero_stage": zero_stage},
            # With the paper's eps of 1e-9 Adam turns the rounding of gradients that are 0 (key biases) into steps.
            "optimizer": {"gradient_clipping": clipping, "weight_decay": weight_decay, "eps": 1e-6},
            "train": {
                "steps": STEPS,
                "global_batch_sequences": 12,
                "micro_batch_sequences": 3,
                "label_smoothing": 0.1,
                "precision": precision,
            },
        },
        "test",
    )


def make_batch(index, step, rows=3, source=11, target=9):
    """A micro-batch of packed rows with padding; lengths differ, so that micro-batches have different token counts."""
    random = torch.Generator().manual_seed(1000 * step + index)
    inputs = [torch.zeros(rows, width, dtype=torch.int32) for width in (source,) * 3 + (target,) * 3]
    labels = torch.zeros(rows, target, dtype=torch.int32)
    weight = torch.zeros(rows, target)
    for row in range(rows):
        ends = [0, 0]
        for segment in (1, 2):
            for side, offset in ((0, 0), (1, 3)):
                length = int(torch.randint(1, 5, (), generator=random))
                part = slice(ends[side], ends[side] + length)
                inputs[offset][row, part] = torch.randint(3, VOCABULARY, (length,), generator=random).int()
                inputs[offset + 1][row, part] = torch.arange(length).int()
                inputs[offset + 2][row, part] = segment
                if side:
                    labels[row, part] = torch.randint(3, VOCABULARY, (length,), generator=random).int()
                    weight[row, part] = 1.0
                ends[side] += length
    return ModelBatch(index, tuple(inputs), labels, weight)


def without_weight(batch, index):
    return ModelBatch(index, batch.inputs, batch.labels, torch.zeros_like(batch.loss_weight))


def share(step, count, rank, ranks):
    """Micro-batches r, r + R, ... of the global batch, filled up with zero-weight copies."""
    each = -(-count // ranks)
    return [
        make_batch(i, step) if i < count else without_weight(make_batch(0, step), i)
        for i in range(rank, each * ranks, ranks)
    ]


def gathered(engine):
    """Full float32 parameters by name, on every rank."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        own = {name: p.detach().float().clone().numpy() for name, p in engine.module.named_parameters()}
    whole = {}
    for stage in among(engine.context.pipeline, own_to_whole(engine, own)):
        for name, value in stage.items():
            assert (whole.setdefault(name, value) == value).all(), f"{name} differs between stages"
    return whole


def own_to_whole(engine, own):
    """This stage's parameters, put together from its tensor ranks."""
    found, whole = among(engine.context.tensor, own), {}
    for name, parameter in engine.module.named_parameters():
        parts = [one[name] for one in found]
        if hasattr(parameter, "sliced"):
            whole[name] = np.concatenate(parts, parameter.sliced.dimension)
        else:
            assert all((part == parts[0]).all() for part in parts), f"{name} differs between tensor ranks"
            whole[name] = parts[0]
    return whole


def among(axis, value):
    """What all ranks along the axis have."""
    if axis.size == 1:
        return [value]
    found = [None] * axis.size
    torch.distributed.all_gather_object(found, value, group=axis.group)
    return found


def train_with_engine(config, count, rank_stops_at=None):
    engine = create_engine(config, VOCABULARY, 0)
    try:
        results = []
        for step in range(1, STEPS + 1):
            batches = share(step, count, engine.context.data.rank, engine.context.data.size)
            stop = rank_stops_at is not None and engine.rank == engine.world_size - 1 and step == rank_stops_at
            results.append(engine.train_step(batches, step, RATE, stop))
        return results, gathered(engine), engine.parameter_count
    finally:
        engine.close()


def plain_adamw(model, section):
    rest = [p for p in model.parameters() if p.ndim == 1 or p is model.embedding.weight]
    decay = [p for p in model.parameters() if all(p is not other for other in rest)]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": section.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=RATE,
        betas=section.betas,
        eps=section.eps,
    )


def train_plainly(config, count, make_optimizer=plain_adamw):
    """No DeepSpeed: the whole global batch in one process, torch's optimizer and torch's clipping."""
    smoothing = config.train.label_smoothing
    model = build_model(config.model, VOCABULARY, config.run.seed)
    optimizer = make_optimizer(model, config.optimizer)
    history = []
    for step in range(1, STEPS + 1):
        batches = [make_batch(i, step).trimmed() for i in range(count)]
        tokens = sum(float(batch.loss_weight.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            key = torch.tensor([step, batch.index])
            logits = model.head.logits(model.hidden(batch.inputs, key)[0]).flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(
                logits, batch.labels.flatten().long(), label_smoothing=smoothing, reduction="none"
            )
            loss = (losses * batch.loss_weight.flatten()).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        history.append((total, norm.item(), tokens))
    return history, {name: p.detach().numpy() for name, p in model.named_parameters()}


def assert_equal_training(config, results, parameters, count):
    assert_equal_to(train_plainly(config, count), results, parameters)


def assert_equal_to(plain, results, parameters):
    history, expected = plain
    for result, (loss, norm, tokens) in zip(results, history, strict=True):
        assert result.loss == pytest.approx(loss, abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, abs=1e-5)
        assert result.target_tokens == tokens
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(parameters[name] - value).max() < 1e-4, name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_equal_a_plain_loop(gloo_pool, zero_stage):  # noqa: F811
    config = make_config(zero_stage=zero_stage)
    for results, parameters, count in gloo_pool.run(2, train_with_engine, config, 4):
        assert_equal_training(config, results, parameters, 4)
        assert count == sum(value.size for value in parameters.values())


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_dropout_does_not_depend_on_the_ranks(gloo_pool, zero_stage):  # noqa: F811
    config = make_config(dropout=0.1, zero_stage=zero_stage)
    results, parameters, _ = gloo_pool.run(2, train_with_engine, config, 4)[0]
    assert_equal_training(config, results, parameters, 4)
    assert results[0].loss != pytest.approx(train_plainly(make_config(), 4)[0][0][0], abs=1e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_three_micro_batches_on_two_ranks(gloo_pool, zero_stage):  # noqa: F811
    config = make_config(zero_stage=zero_stage, dropout=0.1)
    results, parameters, _ = gloo_pool.run(2, train_with_engine, config, 3)[0]
    assert_equal_training(config, results, parameters, 3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_follows_fp32(gloo_pool, zero_stage):  # noqa: F811
    config = make_config(zero_stage=zero_stage, precision="bf16")
    results, _, _ = gloo_pool.run(2, train_with_engine, config, 4)[0]
    history, _ = train_plainly(config, 4)
    for result, (loss, norm, _) in zip(results, history, strict=True):
        assert result.loss == pytest.approx(loss, abs=2e-2)
        assert result.grad_norm == pytest.approx(norm, rel=5e-2)


def test_a_process_that_had_an_engine_trains_with_a_fresh_one():
    pool = GlooPool(2)
    try:
        pool.run(1, train_with_engine, make_config(zero_stage=3), 2)
        for zero_stage in (2, 3):
            config = make_config(zero_stage=zero_stage)
            results, parameters, _ = pool.run(2, train_with_engine, config, 4)[0]
            assert_equal_training(config, results, parameters, 4)
    finally:
        pool.close()


def test_a_stop_of_one_rank_is_heard_by_all(gloo_pool):  # noqa: F811
    for results, _, _ in gloo_pool.run(2, train_with_engine, make_config(), 2, 3):
        assert [result.stop for result in results] == [False, False, True, False, False, False]


def train_with_a_late_rank(config, folder):
    """Rank 1 holds the update back until it has seen rank 0 wait; whether rank 0 was through before."""
    engine = create_engine(config, VOCABULARY, 0)
    waiting, through, early = Path(folder, "waiting"), Path(folder, "through"), []

    def before_update():
        if engine.rank == 0:
            waiting.touch()
            return
        deadline = time.monotonic() + 60
        while not waiting.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Long enough for an update of this model.
        for _ in range(50):
            early.append(through.exists())
            time.sleep(0.01)

    try:
        engine.train_step(share(1, 2, engine.context.data.rank, 2), 1, RATE, before_update=before_update)
        through.touch()
        return any(early)
    finally:
        engine.close()


def test_no_rank_updates_before_all_have_returned_from_before_update(gloo_pool, tmp_path):  # noqa: F811
    assert gloo_pool.run(2, train_with_a_late_rank, make_config(zero_stage=2), str(tmp_path)) == [False, False]


def train_on_nothing(config):
    engine = create_engine(config, VOCABULARY, 0)
    try:
        with pytest.raises(TrainingError, match="no target token"):
            engine.train_step([without_weight(make_batch(0, 1), 0)], 1, RATE)
        before = gathered(engine)
        engine.module.embedding.weight.data[5:50] = float("inf")
        with pytest.raises(TrainingError, match="learning_rate"):
            engine.train_step([make_batch(0, 1)], 1, RATE)
        after = gathered(engine)
        return all((before[name] == after[name]).all() for name in before if name != "embedding.weight")
    finally:
        engine.close()


def test_a_step_without_tokens_or_without_finite_loss_is_an_error_and_changes_nothing(gloo_pool):  # noqa: F811
    assert gloo_pool.run(1, train_on_nothing, make_config()) == [True]


def test_trimming_keeps_loss_and_gradients():
    config = make_config()
    batch = make_batch(0, 1, source=30, target=20)
    small = batch.trimmed()
    assert small.inputs[0].shape[1] < 30 and small.labels.shape[1] < 20
    found = []
    for one in (batch, small):
        model = build_model(config.model, VOCABULARY, 0, 0.1)
        sums = model(one.inputs, None, one.labels, one.loss_weight)
        sums.loss.backward()
        found.append((sums.loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_deepspeed_dictionary():
    shared = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    assert deepspeed_config(make_config(zero_stage=2)) == shared
    half = deepspeed_config(make_config(zero_stage=2, precision="bf16"))
    assert half == {
        **shared,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def offloaded(config, **fields):
    tree = json.loads(config.model_dump_json())
    tree["parallelism"]["offload"] = fields
    return parse_config(tree, "test")


def test_offloaded_states_in_the_dictionary():
    config = offloaded(make_config(zero_stage=3), optimizer="cpu", parameters="cpu")
    found = deepspeed_config(config)
    assert found["zero_force_ds_cpu_optimizer"] is False
    there = {"device": "cpu", "pin_memory": True}
    plain = deepspeed_config(make_config(zero_stage=3))["zero_optimization"]
    assert found["zero_optimization"] == {**plain, "offload_optimizer": there, "offload_param": there}


@pytest.mark.parametrize(
    ("changes", "fields", "words"),
    [
        ({"zero_stage": 2}, {"optimizer": "cpu"}, "parallelism.offload: zero_stage 2 keeps states on the device; set"),
        ({"zero_stage": 3}, {"parameters": "nvme"}, "parallelism.offload.parameters: nvme is not supported"),
    ],
)
def test_what_cannot_be_offloaded_is_named(changes, fields, words):
    with pytest.raises(ConfigError, match=words):
        offloaded(make_config(**changes), **fields)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}], ids=len)
def test_offloaded_states_train_the_same(gloo_pool, fields):  # noqa: F811
    config = make_config(zero_stage=3, dropout=0.1)
    (expected, parameters, _), _ = gloo_pool.run(2, train_with_engine, config, 4)
    for results, found, _ in gloo_pool.run(2, train_with_engine, offloaded(config, **fields), 4):
        for result, wanted in zip(results, expected, strict=True):
            assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
            assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
        assert all(abs(found[name] - value).max() < 1e-5 for name, value in parameters.items())
