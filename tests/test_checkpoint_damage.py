"""Flipped bits, cut files and hostile content in a checkpoint: found, named, harmless; an intact one serves instead."""

import json
import os
import resource
import shutil

import pytest
import torch
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import commit
from cluster.commit import CheckpointError
from cluster.storage import Storage
from configs.load import to_yaml
from jobs.cli import cli
from model.checkpoint import CheckpointReader, load_parameters, write_snapshot
from model.fragments import WEIGHT, Fragment
from tests.test_engine import make_config

OLD, NEW = 10, 20
FILES = (
    "COMMIT",
    "attempt-001/MANIFEST.json",
    "attempt-001/rank-00000.safetensors",
    "attempt-001/rank-00001.safetensors",
)


def weights(step):
    torch.manual_seed(step)
    return {"embedding.weight": torch.randn(30, 8), "encoder_0.inner.weight": torch.randn(8, 16)}


def pieces(step, rank):
    """Half of every parameter's elements."""
    for name, tensor in weights(step).items():
        start, half = rank * tensor.numel() // 2, tensor.numel() // 2
        yield Fragment(name, WEIGHT, tuple(tensor.shape), start, tensor.flatten()[start : start + half])


def write_step(checkpoints, step):
    files = [write_snapshot(checkpoints, step, 1, rank, list(pieces(step, rank))) for rank in range(2)]
    commit.commit(checkpoints, step, 1, files, 2, {"tokens": 100 * step})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "demo"
    for step in (OLD, NEW):
        write_step(Storage(str(folder / "checkpoints")), step)
    (folder / "config.yaml").write_text(to_yaml(make_config()))
    return folder


def loaded(checkpoints, committed):
    with CheckpointReader(checkpoints, committed) as reader:
        return load_parameters(reader)


def newest_intact(checkpoints):
    """What a recovery does: the latest commit, else, when a file of it is damaged, the one before."""
    messages = []
    while True:
        committed, passed_over = commit.latest(checkpoints)
        messages += passed_over
        assert committed is not None, messages
        try:
            return committed.step, loaded(checkpoints, committed), messages
        except CheckpointError as error:
            messages.append(str(error))
            commit.withdraw(checkpoints, committed.step)


def listed(folder, *options):
    result = CliRunner().invoke(cli, ["checkpoints", str(folder), "--json", *options])
    return result.exit_code, {entry["step"]: entry for entry in json.loads(result.stdout)["checkpoints"]}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.none() | st.integers(0, 7))
def test_a_flipped_bit_or_a_cut_is_found_and_the_step_before_serves(run, tmp_path_factory, file, place, bit):
    copy = tmp_path_factory.mktemp("copy") / "demo"
    shutil.copytree(run, copy)
    harmed = copy / "checkpoints" / commit.step_folder(NEW) / file
    content = bytearray(harmed.read_bytes())
    at = int(place * len(content))
    if bit is None:
        harmed.write_bytes(content[:at])
    else:
        content[at] ^= 1 << bit
        harmed.write_bytes(content)
    code, found = listed(copy, "--verify")
    assert code == 1 and found[OLD]["problem"] is None and found[OLD]["verified"]
    named = file if file.endswith(".safetensors") else commit.step_folder(NEW)
    assert named in found[NEW]["problem"]
    step, parameters, messages = newest_intact(Storage(str(copy / "checkpoints")))
    assert step == OLD and len(messages) == 1 and named in messages[0]
    assert all(torch.equal(parameters[name], tensor) for name, tensor in weights(OLD).items())
    shutil.rmtree(copy.parent)


def test_intact_checkpoints_are_listed_and_verified(run):
    assert listed(run)[0] == 0
    code, found = listed(run, "--verify")
    assert code == 0 and list(found) == [OLD, NEW]
    assert (found[NEW]["tokens"], found[NEW]["ranks"], found[NEW]["verified"]) == (2000, 2, True)
    size = sum(path.stat().st_size for path in (run / "checkpoints" / commit.step_folder(NEW)).rglob("*.safetensors"))
    assert found[NEW]["bytes"] == size
    assert list(listed(run, "--step", str(OLD))[1]) == [OLD]
    result = CliRunner().invoke(cli, ["checkpoints", str(run), "--verify"])
    assert result.stdout.count("every byte verified") == 2


# From here on all digests fit: whoever wrote the folder meant it so.


def write_hostile(folder, files=None, content=None):
    """A step whose COMMIT fits its MANIFEST, which says `files`, and whose rank 0 has `content`."""
    checkpoints = Storage(str(folder))
    attempt, data = commit.attempt_folder(NEW, 1), content or b"nothing"
    checkpoints.write_bytes(f"{attempt}/rank-00000.safetensors", data)
    own = {"rank": 0, "path": "rank-00000.safetensors", "bytes": len(data), "digest": xxhash.xxh3_128_hexdigest(data)}
    files = [own] if files is None else files(own)
    text = json.dumps({"format": 1, "step": NEW, "attempt": 1, "world_size": 1, "files": files}).encode()
    checkpoints.write_bytes(f"{attempt}/MANIFEST.json", text)
    marker = json.dumps({"attempt": 1, "digest": xxhash.xxh3_128_hexdigest(text)}).encode()
    checkpoints.write_bytes(f"{commit.step_folder(NEW)}/COMMIT", marker)
    return checkpoints


@pytest.mark.parametrize(
    "files",
    [
        lambda own: [{**own, "path": "../../../../../victim"}],
        lambda own: [{**own, "path": "/tmp/telar-victim"}],
        lambda own: [{**own, "path": "a/rank-00000.safetensors"}],
        lambda own: [{**own, "rank": -1, "path": "rank--0001.safetensors"}],
        lambda own: [{**own, "rank": "0"}],
        lambda own: [{**own, "bytes": 1e30}],
        lambda own: [{**own, "more": 1}],
        lambda own: [own["path"]],
        lambda own: own,
        lambda own: None,
    ],
)
def test_a_manifest_names_no_files_but_those_of_ranks(tmp_path, files):
    checkpoints = write_hostile(tmp_path / "hostile", files=files)
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: is no manifest \("):
        commit.read_commit(checkpoints, NEW)
    assert commit.latest(checkpoints)[0] is None


def test_files_of_absurd_sizes_and_pipes_are_not_read(tmp_path):
    checkpoints = write_hostile(tmp_path / "hostile")
    committed = commit.read_commit(checkpoints, NEW)
    step = tmp_path / "hostile" / commit.step_folder(NEW)
    for name, reads in (
        ("attempt-001/rank-00000.safetensors", False),
        ("attempt-001/MANIFEST.json", True),
        ("COMMIT", True),
    ):
        path, before = step / name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        content = path.read_bytes()
        for spoil in (lambda path: os.truncate(path, 2**40), lambda path: (path.unlink(), os.mkfifo(path))):
            spoil(path)
            with pytest.raises(CheckpointError, match=name):
                commit.read_commit(checkpoints, NEW) if reads else loaded(checkpoints, committed)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10, "more than 100 MiB were taken"
        path.unlink()
        path.write_bytes(content)
    commit.read_commit(checkpoints, NEW)


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(shape, key=f"w|{WEIGHT}|0", elements=4, **metadata):
    shapes = {"shapes": json.dumps({"w": shape}), **metadata}
    tensor = {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}
    return safetensors({"__metadata__": shapes, key: tensor}, b"\0" * 4 * elements)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/telar-victim'\ntR.",
        (2**62).to_bytes(8, "little") + b"{}",
        safetensors(b"[" * 100_000),
        safetensors({f"w|{WEIGHT}|0": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({}),
        described([2**40]),
        described([2**20, 2**20, 2**20]),
        described([-4]),
        described("4"),
        described([4], key="w"),
        described([4], key=f"w|{WEIGHT}|a"),
        described([4], key=f"other|{WEIGHT}|0"),
        described([4], parts=json.dumps({"w": [7, 0, 4]})),
        described([4], parts=json.dumps({"w": [0, 0]})),
    ],
    ids=range(14),
)
def test_hostile_files_take_no_memory_write_nowhere_and_are_never_unpickled(tmp_path, monkeypatch, content):
    monkeypatch.setattr("pickle.Unpickler", None)
    checkpoints = write_hostile(tmp_path / "hostile", content=content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outside = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError):
        loaded(checkpoints, commit.read_commit(checkpoints, NEW))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10, "more than 200 MiB were taken"
    assert sorted(tmp_path.rglob("*")) == outside
