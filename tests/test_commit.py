"""The commit protocol: a step counts only when COMMIT matches its MANIFEST and all rank files are there."""

import pytest
import xxhash

from cluster import commit
from cluster.commit import CheckpointError, RankFile
from cluster.storage import Storage


@pytest.fixture
def checkpoints(tmp_path):
    return Storage(str(tmp_path / "checkpoints"))


def write_ranks(checkpoints, step, attempt, world_size=2):
    files = []
    for rank in range(world_size):
        content = f"state {step} {attempt} {rank}".encode()
        name = commit.rank_file_name(rank)
        checkpoints.write_bytes(f"{commit.attempt_folder(step, attempt)}/{name}", content)
        files.append(RankFile(rank, name, len(content), xxhash.xxh3_128_hexdigest(content)))
    return files


def test_a_committed_step_is_read_back(checkpoints):
    files = write_ranks(checkpoints, 20, 1)
    commit.commit(checkpoints, 20, 1, files, 2, {"tokens": 7})
    found = commit.read_commit(checkpoints, 20)
    assert (found.step, found.attempt, found.manifest["tokens"]) == (20, 1, 7)
    assert [entry["path"] for entry in found.manifest["files"]] == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_files_without_commit_do_not_count(checkpoints):
    write_ranks(checkpoints, 20, 1)
    assert commit.latest(checkpoints) == (None, [])
    with pytest.raises(CheckpointError, match="not committed"):
        commit.read_commit(checkpoints, 20)


def test_a_missing_rank_or_a_short_file_prevents_the_commit(checkpoints):
    files = write_ranks(checkpoints, 20, 1)
    with pytest.raises(CheckpointError, match=r"ranks \[0\] reported, 2 ranks expected"):
        commit.commit(checkpoints, 20, 1, files[:1], 2, {})
    checkpoints.write_bytes(f"{commit.attempt_folder(20, 1)}/rank-00001.safetensors", b"cut")
    with pytest.raises(CheckpointError, match="3 bytes in storage"):
        commit.commit(checkpoints, 20, 1, files, 2, {})
    assert commit.committed_steps(checkpoints) == []


def test_a_second_attempt_cannot_replace_a_commit(checkpoints):
    commit.commit(checkpoints, 20, 2, write_ranks(checkpoints, 20, 2), 2, {})
    with pytest.raises(CheckpointError, match="another attempt"):
        commit.commit(checkpoints, 20, 1, write_ranks(checkpoints, 20, 1), 2, {})
    assert commit.read_commit(checkpoints, 20).attempt == 2


def test_a_damaged_commit_is_replaced_by_the_next_attempt(checkpoints):
    commit.commit(checkpoints, 20, 1, write_ranks(checkpoints, 20, 1), 2, {})
    checkpoints.write_bytes(f"{commit.step_folder(20)}/COMMIT", b"{")
    commit.commit(checkpoints, 20, 2, write_ranks(checkpoints, 20, 2), 2, {})
    assert commit.read_commit(checkpoints, 20).attempt == 2


def test_a_commit_that_appears_meanwhile_is_not_taken_away(checkpoints, monkeypatch):
    late = write_ranks(checkpoints, 20, 1)
    look = Storage.exists

    def other_attempt_commits_after_the_look(storage, path=""):
        found = look(storage, path)
        monkeypatch.undo()
        commit.commit(checkpoints, 20, 2, write_ranks(checkpoints, 20, 2), 2, {})
        return found

    monkeypatch.setattr(Storage, "exists", other_attempt_commits_after_the_look)
    with pytest.raises(CheckpointError, match="another attempt"):
        commit.commit(checkpoints, 20, 1, late, 2, {})
    assert commit.read_commit(checkpoints, 20).attempt == 2


@pytest.mark.parametrize("damaged", ["COMMIT", "attempt-001/MANIFEST.json"])
def test_damage_is_passed_over_and_named(checkpoints, damaged):
    for step in (20, 40):
        commit.commit(checkpoints, step, 1, write_ranks(checkpoints, step, 1), 2, {})
    name = f"{commit.step_folder(40)}/{damaged}"
    content = bytearray(checkpoints.read_bytes(name))
    content[len(content) // 2] ^= 1
    checkpoints.write_bytes(name, bytes(content))
    latest, passed_over = commit.latest(checkpoints)
    assert latest is not None and latest.step == 20
    assert len(passed_over) == 1 and commit.step_folder(40) in passed_over[0]


def test_pruning_keeps_the_newest_and_collects_orphans(checkpoints):
    for step in (10, 20, 30, 40):
        commit.commit(checkpoints, step, 1, write_ranks(checkpoints, step, 1), 2, {})
    write_ranks(checkpoints, 25, 1)
    write_ranks(checkpoints, 50, 2)
    assert commit.prune(checkpoints, keep=2) == [10, 20, 25]
    assert commit.committed_steps(checkpoints) == [30, 40]
    assert commit.step_folder(50) in checkpoints.names()
