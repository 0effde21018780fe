"""Checkpoints between all shapes: what one writes, any other takes up to the bit, and goes on from as the first does.

One process, replicas, ZeRO stages, tensor ranks, pipeline stages and all of them together; ranges of slices and wholes.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import commit
from cluster.storage import Storage
from model.checkpoint import CheckpointReader, load_parameters, snapshot, write_snapshot
from model.engine import create_engine
from model.fragments import restore
from model.sliced import Part, block_of, common, pieces, view
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import VOCABULARY, gathered
from tests.test_fragments import LAST, SAVED, train
from tests.test_parity_matrix import ALL_AXES, DP2, PP2, TP2, Shape, config_of

ONE = Shape()
SHAPES = [ONE, DP2, Shape(data=2, zero=3), TP2, PP2, ALL_AXES]
QUICK = [PP2, ONE]


def save(config, folder):
    """Steps 1 to SAVED, a checkpoint, and the losses of the steps after it."""
    engine = create_engine(config, VOCABULARY, 0)
    try:
        train(engine, 1, SAVED)
        file = write_snapshot(Storage(folder), SAVED, 1, engine.rank, snapshot(engine))
        whole = gathered(engine)
        return file, whole, train(engine, SAVED + 1, LAST), gathered(engine)
    finally:
        engine.close()


def take_up(config, source, target):
    """Restore, write at once what was restored, and train on."""
    engine = create_engine(config, VOCABULARY, 0)
    try:
        with CheckpointReader(Storage(source), commit.read_commit(Storage(source), SAVED)) as reader:
            restore(engine, reader)
        file = write_snapshot(Storage(target), SAVED, 1, engine.rank, snapshot(engine))
        whole = gathered(engine)
        return file, whole, train(engine, SAVED + 1, LAST), gathered(engine)
    finally:
        engine.close()


def committed(results, folder):
    """Commit what the ranks wrote; returns all but their files, which is the same on each."""
    storage = Storage(str(folder))
    commit.commit(storage, SAVED, 1, [file for file, *_ in results], len(results), {})
    (_, first, losses, last), *others = results
    for _, whole, found, end in others:
        assert same(whole, first) and found == losses and same(end, last)
    return first, losses, last


def whole_state(folder):
    """Every state of every parameter, as one process would read it."""
    storage = Storage(str(folder))
    with CheckpointReader(storage, commit.read_commit(storage, SAVED)) as reader:
        states = {
            (name, state): reader.read(name, state, 0, math.prod(reader.shapes()[name])).numpy()
            for name, state in reader._ranges
        }
        # Nothing is stored twice, and evaluation in one process reads the whole parameters.
        stored = sum(piece.numel for ranges in reader._ranges.values() for piece in ranges)
        assert stored == sum(value.size for value in states.values())
        loaded = {name: value.numpy() for name, value in load_parameters(reader).items()}
        assert same(loaded, {name: states[name, "fp32"].reshape(value.shape) for name, value in loaded.items()})
        return states, loaded


def same(one, other):
    return one.keys() == other.keys() and all((one[key] == value).all() for key, value in other.items())


def check(pool, folder, first, others, **more):
    """`first` writes, each of the `others` takes up and writes again."""
    config = config_of("pairs", first, 0.1, **more)
    saved, losses, end = committed(pool.run(first.ranks, save, config, str(folder / "first")), folder / "first")
    states, loaded = whole_state(folder / "first")
    if config.train.precision == "fp32":
        assert same(loaded, saved)
    for other in others:
        target = folder / str(other)
        config = config_of("pairs", other, 0.1, **more)
        found = pool.run(other.ranks, take_up, config, str(folder / "first"), str(target))
        taken_up, continued, last = committed(found, target)
        assert same(taken_up, saved), f"{other} computes with other parameters"
        assert same(whole_state(target)[0], states), f"{other} has another state"
        if other == first:
            assert continued == losses and same(last, end)
        elif config.train.precision == "fp32":
            assert continued == pytest.approx(losses, abs=1e-5)
            assert all(abs(last[name] - value).max() < 1e-4 for name, value in end.items())
        else:
            assert continued == pytest.approx(losses, abs=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("first", SHAPES, ids=str)
def test_any_shape_takes_up_what_any_other_wrote(gloo_pool, tmp_path, first):  # noqa: F811
    check(gloo_pool, tmp_path, first, SHAPES)


def test_one_process_takes_up_what_two_stages_wrote(gloo_pool, tmp_path):  # noqa: F811
    check(gloo_pool, tmp_path, PP2, [ONE])


@pytest.mark.slow
def test_in_bf16_too(gloo_pool, tmp_path):  # noqa: F811
    check(gloo_pool, tmp_path, Shape(pipeline=2, tensor=2), [Shape(pipeline=2, tensor=2), DP2], precision="bf16")


@settings(deadline=None, max_examples=300)
@given(data=st.data(), rows=st.integers(1, 7), columns=st.integers(1, 6))
def test_a_range_of_a_slice_lies_where_numpy_says(data, rows, columns):
    """Any range of any slice, read out of any range of any other, holds the elements that both have, and no others."""
    whole = torch.arange(rows * columns).view(rows, columns)

    def any_range():
        dimension = data.draw(st.sampled_from([None, 0, 1]))
        if dimension is None:
            part, matrix = None, whole
        else:
            start = data.draw(st.integers(0, whole.shape[dimension] - 1))
            stop = data.draw(st.integers(start + 1, whole.shape[dimension]))
            part, matrix = Part(dimension, start, stop), whole.narrow(dimension, start, stop - start)
        first = data.draw(st.integers(0, matrix.numel() - 1))
        numel = data.draw(st.integers(1, matrix.numel() - first))
        block = block_of(whole.shape, part)
        return list(pieces(block, first, numel)), matrix.flatten()[first : first + numel].clone()

    (held, stored), (wanted, expected) = any_range(), any_range()
    assert sum(block.size for block, _ in wanted) == len(expected) and len(wanted) <= 3
    result = torch.full_like(expected, -1)
    for block, at in held:
        for other, to in wanted:
            both = common(block, other)
            if both is not None:
                view(result, to, other, both).copy_(view(stored, at, block, both))
    known = np.isin(expected, stored)
    assert (result[known] == expected[known]).all() and (result[~known] == -1).all()
