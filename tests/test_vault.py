"""What vaults hold, when a snapshot counts, and that a whole one restores as the checkpoint of that step would."""

from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.commit import RankFile, commit
from jobs.vault import Part, Shelf, StaleAttempt, newest
from jobs.vaults import unwritten


def part(step, rank=0, attempt=1, world=2):
    extra = {"tokens": step, "data_state": {"quarantined": [f"shard-{rank}"]}}
    return Part(step, attempt, world, RankFile(rank, f"rank-{rank}", 1, "d"), extra)


def test_a_shelf_keeps_the_last_two_parts_of_each_rank_and_refuses_an_old_attempt():
    shelf = Shelf()
    for step in (1, 2, 3):
        for rank in (0, 1):
            shelf.keep(part(step, rank), b"%d" % step)
    assert sorted(held.key for held in shelf.parts()) == [(1, 2, 0), (1, 2, 1), (1, 3, 0), (1, 3, 1)]
    shelf.begin(2)
    with pytest.raises(StaleAttempt):
        shelf.keep(part(4), b"")
    # What the attempt before left goes when all ranks of the new one have delivered, not with the first part.
    shelf.keep(part(4, 0, attempt=2), b"new")
    assert len(shelf.parts()) == 5
    shelf.keep(part(5, 0, attempt=2), b"new")
    assert sorted(held.key for held in shelf.parts()) == [(2, 4, 0), (2, 5, 0)]
    shelf.forget(5)
    assert shelf.content((2, 4, 0)) == b"new" and shelf.content((2, 5, 0)) is None


def test_a_snapshot_counts_only_when_all_ranks_of_one_attempt_have_delivered():
    one, other = [part(7, 0), part(8, 0)], [part(7, 1), part(9, 1, attempt=2), part(9, 0, attempt=1)]
    found = newest([("a", one), ("b", other)])
    assert found.step == 7 and found.holders == (("a",), ("b",))
    assert newest([("a", one)]) is None and newest([]) is None
    committed = newest([("a", [*one, part(7, 1)]), ("b", other)]).committed()
    assert committed.manifest["data_state"]["quarantined"] == ["shard-0", "shard-1"] and committed.step == 7


@settings(deadline=None, max_examples=300)
@given(
    world=st.integers(2, 4),
    moments=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=120),
    lost=st.integers(0, 3),
    resized=st.integers(2, 4),
)
def test_whatever_node_is_lost_at_most_one_step_is_redone(world, moments, lost, resized):
    """Ranks, one a node, update together and then deliver, each in its own time, to their own shelf and the next one's.

    What `RankReporter.before_update` and `Engine.train_step` see to: none updates before all have delivered the step
    before.
    """
    shelves = [Shelf() for _ in range(4)]
    for attempt, size in ((1, world), (2, resized)):
        start = max((held.step for shelf in shelves for held in shelf.parts()), default=0)
        done, delivered = dict.fromkeys(range(size), start), dict.fromkeys(range(size), start)
        for shelf in shelves:
            shelf.begin(attempt)
        for rank, delivers in moments:
            if rank >= size:
                continue
            if delivers and delivered[rank] < done[rank]:
                delivered[rank] += 1
                for shelf in (shelves[rank], shelves[(rank + 1) % size]):
                    shelf.keep(part(delivered[rank], rank, attempt, size), b"")
            elif not delivers and done[rank] == min(delivered.values()):
                done[rank] += 1
        gone = lost % size
        offers = [(number, shelf.parts()) for number, shelf in enumerate(shelves) if number != gone]
        found = newest(offers)
        assert (found.step if found else 0) >= max(done.values()) - 1
        # For the second attempt: it starts from there, in the same vaults.
        if found is None:
            return
        for shelf in shelves:
            for held in shelf.parts():
                if held.step > found.step:
                    shelf.forget(held.step)


def test_bytes_that_are_kept_are_the_vaults_own(tmp_path):
    from jobs.vault import Vault

    content = bytearray(b"state")
    vault = Vault()
    vault.begin(1, None)
    assert vault.deliver(part(3), content) is False
    content[:] = b"other"
    assert vault.content(part(3).key) == b"state"
    assert not list(Path(tmp_path).iterdir())


def test_a_vault_writes_a_part_as_its_rank_would_have_and_nothing_that_is_damaged(tmp_path):
    from cluster.storage import Storage
    from jobs.vault import Vault

    content = b"state of rank 0"
    file = RankFile(0, "rank-00000.safetensors", len(content), xxhash.xxh3_128_hexdigest(content))
    held = Part(3, 1, 1, file, part(3).extra)
    vault = Vault()
    vault.keep(held, content)
    assert vault.write(held.key, str(tmp_path), "step-00000003/attempt-002")
    storage = Storage(str(tmp_path))
    assert commit(storage, 3, 2, [file], 1, {"tokens": 1}).step == 3
    assert storage.read_bytes("step-00000003/attempt-002/rank-00000.safetensors") == content
    vault.keep(held, b"state of rank O")
    assert not vault.write(held.key, str(tmp_path), "other") and not vault.write((9, 9, 9), str(tmp_path), "other")
    assert storage.names() == ["step-00000003"]


def test_what_a_commit_says_leaves_the_records_of_steps_out():
    told = {"tokens": 7, "run": "r", "records": [{"step": 6}, {"step": 7}], "data_state": {"quarantined": ["b"]}}
    first = Part(7, 1, 2, part(7).file, told)
    snapshot = newest([("a", [first, part(7, 1)])])
    assert snapshot.extra() == {"tokens": 7, "run": "r", "data_state": {"quarantined": ["b", "shard-1"]}}
    assert unwritten(snapshot) == told["records"] and unwritten(None) == ()
