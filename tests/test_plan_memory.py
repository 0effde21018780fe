"""Predicted memory against what is measured: tensors that autograd saves, and a DeepSpeed engine's own."""

import gc
import json

import pytest
import torch

from configs.load import parse_config
from jobs.plan.layout import Layout
from jobs.plan.memory import BUCKET_BYTES, rank_memory
from jobs.plan.parameters import shape_of
from jobs.plan.techniques import Techniques
from model.transformer import build_model
from tests.bench import memory
from tests.gloo_pool import GlooPool, gloo_pool  # noqa: F401
from tests.test_plan import LLAMA, make_config, whole_inputs

RANKS = 2
SAVING = {
    "encoder_decoder": {},
    "encoder_decoder, pre": {"norm_placement": "pre"},
    "encoder_decoder, dropout": {"dropout": 0.1},
    "decoder, gelu": {"architecture": "decoder", "norm_placement": "pre", "feed_forward": "gelu"},
    "decoder, llama": LLAMA,
    "encoder": {"architecture": "encoder"},
    "encoder, swiglu": {"architecture": "encoder", "norm_placement": "pre", "feed_forward": "swiglu"},
}


@pytest.mark.parametrize("name", SAVING)
def test_activations_are_what_autograd_saves(name):
    config = make_config(source=96, target=64, d_model=64, d_ff=256, encoder_layers=3, **SAVING[name])
    model = build_model(config.model, 320, 0).train()
    inputs, labels, weight = whole_inputs(config, rows=2)
    if config.model.architecture == "encoder":
        labels = torch.zeros_like(labels)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        # Kept alive, or another tensor might get the same address.
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs, torch.tensor([1, 0]), labels, weight)
    predicted = rank_memory(config, shape_of(config), Layout(1, 1, 1, 1, 8), Techniques()).activations
    assert predicted == pytest.approx(sum(storages.values()), rel=0.15)


def measure(tree):
    """Bytes of an engine's parameters, gradients and optimizer states on this rank, after a step and a backward."""
    from model.engine import create_engine
    from tests.test_engine import make_batch

    def storages(held=()):
        found = {}
        # A gradient that only its parameter holds is no object of Python before somebody asks for it.
        for thing in [*gc.get_objects(), *held]:
            # isinstance would ask lazy modules of other packages for their class, and import them.
            if issubclass(type(thing), torch.Tensor):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return found

    gc.collect()
    # Kept alive, or others would get their addresses.
    present = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    before = storages()
    engine = create_engine(parse_config(tree, "test"), tree["data"]["tokenizer"]["vocabulary_size"], 0)
    engine.train_step([make_batch(0, 1)], 1, 1e-3)
    parameters = {}
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                parameters[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    optimizer = engine.deepspeed.optimizer
    states = {}
    inner = optimizer.optimizer
    # Between steps ZeRO-3 keeps the master partitions of its groups apart from them.
    held = [p for group in inner.param_groups for p in group["params"]]
    held += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    held += [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    for tensor in held:
        states[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    engine.deepspeed.set_gradient_accumulation_boundary(False)
    batch = make_batch(0, 2)
    result = engine.deepspeed(batch.inputs, torch.tensor([2, 0]), batch.labels, batch.loss_weight)
    engine.deepspeed.backward(result.loss)
    del result, batch
    gc.collect()
    after = storages(parameter.grad for parameter in engine.module.parameters())
    weighed = {
        "parameters": sum(parameters.values()),
        "optimizer": sum(states.values()),
        "all": sum(size for address, size in after.items() if address not in before),
        "count": engine.parameter_count,
        "before": len(present),
    }
    engine.close()
    return weighed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_are_those_of_a_real_engine(gloo_pool, zero, precision):  # noqa: F811
    config = make_config(
        source=11, target=9, rows=3, batch=6, precision=precision, zero=zero, d_model=512, d_ff=2048, vocabulary=4000
    )
    tree = json.loads(config.model_dump_json())
    tree["cluster"]["device"] = "cpu"
    tree["parallelism"]["data"] = RANKS
    config = parse_config(tree, "test")
    weighed = gloo_pool.run(RANKS, measure, tree)[0]
    predicted = rank_memory(config, shape_of(config), Layout(1, 1, RANKS, zero, 8), Techniques())
    assert weighed["parameters"] == pytest.approx(predicted.parameters, rel=0.15)
    assert weighed["optimizer"] == pytest.approx(predicted.optimizer, rel=0.15)
    # What is left is gradients, and the bucket where it is kept between micro-batches.
    rest = weighed["all"] - weighed["parameters"] - weighed["optimizer"]
    buckets = BUCKET_BYTES if (zero, precision) == (1, "fp32") or zero == 3 else 0
    assert rest == pytest.approx(predicted.gradients + buckets, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1, 1), (2, 1, 1, 2), (2, 1, 1, 3), (1, 1, 2, 1), (1, 2, 1, 1)], ids=str)
def test_ranks_of_a_model_of_60_million_hold_what_the_plan_says(layout):
    """Replicas, stages, tensor ranks and ZeRO stage; `python -m tests.bench.memory` prints the whole table."""
    pool = GlooPool()
    try:
        row = memory.measure(pool, layout, "fp32")
    finally:
        pool.close()
    measured, predicted = (sum(row[side].values()) for side in ("measured", "predicted"))
    assert predicted == pytest.approx(measured, rel=0.15)
