"""Checkpoints of slices: written with tensor ranks and read without, and the reverse; ranges of slices and wholes."""

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
from tests.test_engine import VOCABULARY, gathered, make_config
from tests.test_fragments import LAST, SAVED, load_and_go_on, saved, train
from tests.test_muon import muon_config


def reload_and_save(config, source, target):
    """Restore and write at once, without a step."""
    engine = create_engine(config, VOCABULARY, 0)
    try:
        with CheckpointReader(Storage(source), commit.read_commit(Storage(source), SAVED)) as reader:
            restore(engine, reader)
        return write_snapshot(Storage(target), SAVED, 1, engine.rank, snapshot(engine)), gathered(engine)
    finally:
        engine.close()


def whole_state(folder):
    """Every state of every parameter, as one process would read it, and the elements stored."""
    storage = Storage(str(folder))
    with CheckpointReader(storage, commit.read_commit(storage, SAVED)) as reader:
        states = {
            (name, state): reader.read(name, state, 0, math.prod(reader.shapes()[name])).numpy()
            for name, state in reader._ranges
        }
        stored = sum(piece.numel for ranges in reader._ranges.values() for piece in ranges)
        return states, stored, {name: value.numpy() for name, value in load_parameters(reader).items()}


def same(one, other):
    return one.keys() == other.keys() and all((one[key] == value).all() for key, value in other.items())


@pytest.mark.parametrize(
    "stages", [(1, 1), pytest.param((3, 2), marks=pytest.mark.slow), pytest.param((2, 3), marks=pytest.mark.slow)]
)
def test_two_tensor_ranks_to_one_and_back(gloo_pool, tmp_path, stages):  # noqa: F811
    shared, alone = (make_config(dropout=0.1, tensor=size, zero_stage=stages[size - 1]) for size in (2, 1))
    losses, parameters, middle, _ = saved(gloo_pool, shared, 2, tmp_path / "two")
    states, stored, loaded = whole_state(tmp_path / "two")
    # Nothing is stored twice, and evaluation in one process reads the whole parameters.
    assert stored == sum(value.size for value in states.values())
    assert same(loaded, middle)
    # Without a step between, every state comes back to the bit, through one rank and then two again.
    for source, target, config, ranks in (("two", "one", alone, 1), ("one", "again", shared, 2)):
        results = gloo_pool.run(ranks, reload_and_save, config, str(tmp_path / source), str(tmp_path / target))
        commit.commit(Storage(str(tmp_path / target)), SAVED, 1, [file for file, _ in results], ranks, {})
        assert same(whole_state(tmp_path / target)[0], states)
        assert all(same(computed_with, middle) for _, computed_with in results)
    # And both go on as the run that was not interrupted.
    for config, ranks in ((alone, 1), (shared, 2)):
        for found, end in gloo_pool.run(ranks, load_and_go_on, config, str(tmp_path / "two")):
            assert found == pytest.approx(losses, abs=1e-5)
            assert all(abs(end[name] - value).max() < 1e-4 for name, value in parameters.items())


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "ranks", "stage"), [(1, 3, 3), (4, 4, 3), (2, 4, 2), (2, 4, 3)])
def test_any_shape_goes_on_from_two_replicas_of_two(gloo_pool, tmp_path, tensor, ranks, stage):  # noqa: F811
    losses, parameters, _, _ = saved(gloo_pool, make_config(dropout=0.1, tensor=2, zero_stage=3), 4, tmp_path)
    config = make_config(dropout=0.1, tensor=tensor, zero_stage=stage)
    for found, end in gloo_pool.run(ranks, load_and_go_on, config, str(tmp_path)):
        assert found == pytest.approx(losses, abs=1e-5)
        assert all(abs(end[name] - value).max() < 1e-4 for name, value in parameters.items())


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


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (4, 1), (4, 3)])
def test_muon_orthogonalises_whole_matrices(gloo_pool, tmp_path, ranks, stage):  # noqa: F811
    config, alone = (muon_config(dropout=0.1, zero_stage=stage, model={}, tensor=size) for size in (2, 1))
    losses, parameters, _, _ = saved(gloo_pool, config, ranks, tmp_path)
    for found, end in gloo_pool.run(1, load_and_go_on, alone, str(tmp_path)):
        assert found == pytest.approx(losses, abs=1e-5)
        assert all(abs(end[name] - value).max() < 1e-4 for name, value in parameters.items())
    (plain,) = gloo_pool.run(1, train_whole, alone)
    assert all(abs(plain[name] - value).max() < 1e-4 for name, value in parameters.items())


def train_whole(config):
    engine = create_engine(config, VOCABULARY, 0)
    try:
        train(engine, 1, LAST)
        return gathered(engine)
    finally:
        engine.close()
