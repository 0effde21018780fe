"""Fragments and rank files: any number of ranks at any ZeRO stage continues what another shape has saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cluster import commit
from cluster.commit import CheckpointError
from cluster.storage import Storage
from model.checkpoint import (
    CheckpointReader,
    load_parameters,
    serialized,
    snapshot,
    snapshot_bytes,
    write_snapshot,
)
from model.engine import create_engine
from model.fragments import STATES, fragments, restore
from model.transformer import build_model
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import RATE, VOCABULARY, gathered, make_config, offloaded, share

SAVED, LAST, COUNT = 3, 6, 4


def train(engine, first, last):
    steps = range(first, last + 1)
    data = engine.context.data
    return [engine.train_step(share(i, COUNT, data.rank, data.size), i, RATE).loss for i in steps]


def save_and_go_on(config, folder):
    """Save after step SAVED, train on to LAST; the snapshot is written only then."""
    engine = create_engine(config, VOCABULARY, 0)
    try:
        train(engine, 1, SAVED)
        pieces = snapshot(engine)
        owned = [(piece.name, piece.state, piece.start, piece.tensor.numel()) for piece in fragments(engine)]
        middle = gathered(engine)
        losses = train(engine, SAVED + 1, LAST)
        record = write_snapshot(Storage(folder), SAVED, 1, engine.rank, pieces, {"note": "x"})
        return record, losses, gathered(engine), middle, owned
    finally:
        engine.close()


def snapshots_of_two_steps(config):
    """Of each step the state as `serialized` gives it and as `snapshot_bytes` does, which fills the same room again."""
    engine = create_engine(config, VOCABULARY, 0)
    try:
        found, room = [], None
        for step in (1, 2):
            train(engine, step, step)
            filled = snapshot_bytes(engine, {"step": str(step)}, room)
            assert room is None or filled is room
            room = filled
            found.append((b"".join(serialized(snapshot(engine), {"step": str(step)})), room.tobytes()))
        return found
    finally:
        engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_the_bytes_in_memory_are_those_of_the_file(gloo_pool, stage):  # noqa: F811
    for (one, same), (two, same_two) in gloo_pool.run(2, snapshots_of_two_steps, make_config(zero_stage=stage)):
        assert one == same and two == same_two and one != two


def load_and_go_on(config, folder, used_before=False):
    engine = create_engine(config, VOCABULARY, 0)
    try:
        if used_before:
            train(engine, 1, 2)
        with CheckpointReader(Storage(folder), commit.read_commit(Storage(folder), SAVED)) as reader:
            restore(engine, reader)
        return train(engine, SAVED + 1, LAST), gathered(engine)
    finally:
        engine.close()


def saved(pool, config, ranks, folder):
    """Commit what `ranks` processes save; returns (losses after, parameters after, parameters at the save, owned)."""
    results = pool.run(ranks, save_and_go_on, config, str(folder))
    commit.commit(Storage(str(folder)), SAVED, 1, [result[0] for result in results], ranks, {})
    return (*results[0][1:4], [result[4] for result in results])


@pytest.fixture(scope="module")
def two_ranks_stage_1(gloo_pool, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("two-ranks")
    return folder, *saved(gloo_pool, make_config(dropout=0.1), 2, folder)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_another_shape_continues_the_curve(gloo_pool, two_ranks_stage_1, ranks, stage):  # noqa: F811
    folder, losses, parameters, _, _ = two_ranks_stage_1
    for found, end in gloo_pool.run(ranks, load_and_go_on, make_config(dropout=0.1, zero_stage=stage), str(folder)):
        assert found == pytest.approx(losses, abs=1e-5)
        assert all(abs(end[name] - value).max() < 1e-4 for name, value in parameters.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_shape_continues_bit_for_bit(gloo_pool, tmp_path, stage, precision):  # noqa: F811
    config = make_config(dropout=0.1, zero_stage=stage, precision=precision)
    losses, parameters, _, _ = saved(gloo_pool, config, 2, tmp_path)
    for found, end in gloo_pool.run(2, load_and_go_on, config, str(tmp_path), True):
        assert found == losses
        assert all((end[name] == value).all() for name, value in parameters.items())


def test_a_smaller_world_s_fragments_serve_a_larger_one(gloo_pool, tmp_path):  # noqa: F811
    losses, _, _, _ = saved(gloo_pool, make_config(zero_stage=3), 1, tmp_path)
    assert gloo_pool.run(3, load_and_go_on, make_config(zero_stage=2), str(tmp_path))[0][0] == pytest.approx(
        losses, abs=1e-5
    )


def test_every_element_lies_on_exactly_one_rank(two_ranks_stage_1):
    _, _, parameters, _, owned = two_ranks_stage_1
    for name, value in parameters.items():
        for state in STATES:
            covered = np.zeros(value.size, dtype=int)
            for piece in (piece for rank in owned for piece in rank if piece[:2] == (name, state)):
                covered[piece[2] : piece[2] + piece[3]] += 1
            assert (covered == 1).all(), (name, state)


def test_evaluation_loads_the_full_parameters(two_ranks_stage_1):
    folder, _, _, middle, _ = two_ranks_stage_1
    storage = Storage(str(folder))
    loaded = load_parameters(CheckpointReader(storage, commit.read_commit(storage, SAVED)))
    assert loaded.keys() == middle.keys()
    assert all((loaded[name].numpy() == value).all() for name, value in middle.items())
    model = build_model(make_config().model, VOCABULARY, seed=99)
    model.load(loaded)
    assert (model.head.weight.detach().numpy() == middle["embedding.weight"]).all()
    with pytest.raises(KeyError, match="parameters differ"):
        model.load({})


def test_rank_files_are_plain_safetensors(two_ranks_stage_1):
    folder = two_ranks_stage_1[0]
    path = folder / commit.attempt_folder(SAVED, 1) / commit.rank_file_name(0)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["step"] == str(SAVED) and file.metadata()["note"] == "x"
        assert json.loads(file.metadata()["shapes"])["embedding.weight"] == [VOCABULARY, 32]
        assert file.get_tensor("embedding.weight|fp32|0").dtype == torch.float32


def test_remote_storage_is_read_through_a_verified_copy(two_ranks_stage_1):
    folder = two_ranks_stage_1[0]
    remote = Storage(f"memory://telar-{folder.name}")
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            remote.write_bytes(path.relative_to(folder).as_posix(), path.read_bytes())
    with CheckpointReader(remote, commit.read_commit(remote, SAVED)) as reader:
        kept = Path(reader._temporary.name)
        assert reader.read("embedding.weight", "fp32", 5, 40).shape == (40,)
        assert reader.step == SAVED and "encoder_0.attention.query.weight" in reader.names()
    assert not kept.exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_before_anything_is_read(two_ranks_stage_1, tmp_path, harm):
    storage = Storage(str(tmp_path))
    for path in sorted(two_ranks_stage_1[0].rglob("*")):
        if path.is_file():
            storage.write_bytes(path.relative_to(two_ranks_stage_1[0]).as_posix(), path.read_bytes())
    broken = tmp_path / commit.attempt_folder(SAVED, 1) / commit.rank_file_name(1)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: broken.write_bytes(content),
        "cut": lambda: broken.write_bytes(content[:-8]),
        "remove": broken.unlink,
    }[harm]()
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors"):
        CheckpointReader(storage, commit.read_commit(storage, SAVED))


def test_ranges_that_no_file_holds_are_an_error(two_ranks_stage_1):
    storage = Storage(str(two_ranks_stage_1[0]))
    reader = CheckpointReader(storage, commit.read_commit(storage, SAVED))
    with pytest.raises(CheckpointError, match="incomplete"):
        reader.read("embedding.weight", "fp32", VOCABULARY * 32 - 1, 2)


def load_another_model(config, folder):
    engine = create_engine(config, VOCABULARY + 3, 0)
    try:
        storage = Storage(folder)
        with pytest.raises(CheckpointError, match=r"embedding\.weight"):
            restore(engine, CheckpointReader(storage, commit.read_commit(storage, SAVED)))
    finally:
        engine.close()


def test_a_checkpoint_of_another_model_is_refused_by_name(gloo_pool, two_ranks_stage_1):  # noqa: F811
    gloo_pool.run(1, load_another_model, make_config(), str(two_ranks_stage_1[0]))


@pytest.mark.slow
def test_offloaded_states_are_saved_and_loaded(gloo_pool, two_ranks_stage_1, tmp_path):  # noqa: F811
    config = offloaded(make_config(dropout=0.1, zero_stage=3), optimizer="cpu", parameters="cpu")
    losses, parameters, _, _ = saved(gloo_pool, config, 2, tmp_path)
    for found, end in gloo_pool.run(2, load_and_go_on, config, str(tmp_path), True):
        assert found == losses
        assert all((end[name] == value).all() for name, value in parameters.items())
    folder, losses, _, _, _ = two_ranks_stage_1
    assert gloo_pool.run(3, load_and_go_on, config, str(folder))[0][0] == pytest.approx(losses, abs=1e-5)
