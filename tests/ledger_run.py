"""A training run without a model: ranks are processes that are killed at random and start again from the last commit.

`python -m tests.ledger_run FOLDER SEED KILLS`: forks the ranks of an attempt, lets them go from step to step together
(as an all-reduce does), commits every third step when all have done it, kills one rank at a random moment, then all,
and starts the next attempt at another world size from the state in the last commit. Every rank writes what each step
gave it to a file of its own before it says that the step is done. Prints the attempts as JSON.
"""

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import numpy as np
import xxhash

from cluster.storage import Storage
from configs.load import parse_config
from data.loader import Loader
from data.manifest import Manifest
from data.shard_server import plain_opener
from tests.sample_data import FIELDS

COMMIT_EVERY = 3
WORLD_SIZES = range(1, 8)
DEADLINE_SECONDS = 120


def row_digest(row):
    """Digest of all fields of one row of a batch, given as lists."""
    return xxhash.xxh3_64_hexdigest(json.dumps([row[name] for name in FIELDS]).encode())


def rank_main(folder, attempt, rank, world, state, reports, orders):
    storage = Storage(str(folder))
    manifest = Manifest.read(storage, "data/abc")
    config = parse_config(json.loads((folder / "config.json").read_text()), "test")
    loader = Loader(manifest, config, plain_opener(storage, manifest), rank, world)
    if state is not None:
        loader.load_state(state)
    micro_batches = config.train.global_batch_sequences // config.train.micro_batch_sequences
    with (folder / f"ledger-{attempt}-{rank}.jsonl").open("w") as ledger:
        while True:
            batches = loader.next_step()
            state = loader.state()
            for batch in batches:
                if batch.index >= micro_batches:
                    assert batch.loss_weight.sum() == 0
                    continue
                rows = [
                    {name: getattr(batch, name)[line].tolist() for name in FIELDS} for line in range(len(batch.labels))
                ]
                entry = {
                    "consumed": state["samples_consumed"],
                    "index": batch.index,
                    "rows": [[row["labels"][0], row_digest(row)] for row in rows],
                }
                ledger.write(json.dumps(entry) + "\n")
            ledger.flush()
            os.write(reports, (json.dumps(state) + "\n").encode())
            if os.read(orders, 1) != b"g":
                return


class Rank:
    """A forked rank, its pipes, and the states it reported."""

    def __init__(self, folder, attempt, rank, world, state, others):
        self.reports, reports = os.pipe()
        orders, self.orders = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for end in (self.reports, self.orders, *(end for other in others for end in other.ends)):
                    os.close(end)
                rank_main(folder, attempt, rank, world, state, reports, orders)
            finally:
                os._exit(1)
        os.close(reports)
        os.close(orders)
        self.ends = (self.reports, self.orders)
        self.text = b""

    def read(self):
        """States reported since; raises when the rank is gone."""
        content = os.read(self.reports, 1 << 16)
        assert content, "a rank ended by itself"
        *lines, self.text = (self.text + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for end in self.ends:
            os.close(end)


def run_attempt(folder, attempt, world, state, last, kill_after, generator):
    """Steps of one attempt until a rank is killed (after `kill_after` reports) or the run ends; the last commit."""
    ranks, committed, reported = [], state, 0
    try:
        for rank in range(world):
            ranks.append(Rank(folder, attempt, rank, world, state, ranks))
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            states = []
            waiting = {rank.reports: rank for rank in ranks}
            while waiting:
                if kill_after is not None and reported >= kill_after:
                    time.sleep(generator.uniform(0, 0.01))
                    os.kill(generator.choice(ranks).pid, signal.SIGKILL)
                    return committed
                ready, _, _ = select.select(list(waiting), [], [], max(0, deadline - time.monotonic()))
                assert ready, "no rank reported within the deadline"
                for end in ready:
                    found = waiting[end].read()
                    if found:
                        states += found
                        reported += 1
                        del waiting[end]
            assert all(other == states[0] for other in states), "ranks differ about where they are"
            step = states[0]["samples_consumed"] // BATCH
            if step % COMMIT_EVERY == 0 or step == last:
                committed = states[0]
            if step == last:
                return committed
            for rank in ranks:
                os.write(rank.orders, b"g")
    finally:
        for rank in ranks:
            rank.end()


def main(folder, seed, kills):
    global BATCH
    folder, generator = Path(folder), random.Random(int(seed))
    tree = json.loads((folder / "config.json").read_text())
    BATCH, last = tree["train"]["global_batch_sequences"], tree["train"]["steps"]
    # What ranks would import at their first use is imported once, before they are forked.
    assert np.ma and Manifest.read(Storage(str(folder)), "data/abc").corpora
    state, attempts = None, []
    while state is None or state["samples_consumed"] < last * BATCH:
        attempt, world = len(attempts), generator.choice(WORLD_SIZES)
        # Reports until the kill: on average the attempts get through the run together.
        kill_after = generator.randrange(2 * world * last // int(kills) + 1) if attempt < int(kills) else None
        begin = state["samples_consumed"] if state else 0
        state = run_attempt(folder, attempt, world, state, last, kill_after, generator)
        end = state["samples_consumed"] if state else 0
        attempts.append({"world": world, "begin": begin, "end": end, "killed": kill_after is not None})
    print(json.dumps(attempts))


if __name__ == "__main__":
    main(*sys.argv[1:])
