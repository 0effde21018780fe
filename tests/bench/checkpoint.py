"""What checkpoints cost training: `python -m tests.bench.checkpoint`; prints a table, writes one JSON.

Two ranks over gloo train one model. Blocks of steps follow each other in turns: without checkpoints, with Telar's
(copied between two steps, written and committed behind the training thread's back) and with DeepSpeed's
`save_checkpoint` on the same engine, one checkpoint per `--every` steps. What a kind costs is the wall time of its
block minus that of the block without, in the same repeat; a block ends half an interval after its last checkpoint, so
that its uploads lie in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster import commit
from cluster.storage import Storage
from configs.load import parse_config
from jobs.machine import hardware, versions
from jobs.progress import Progress
from jobs.rank import Messages, RankReporter, RankTask
from tests.bench.figures import ratio, spread
from tests.bench.memory import VOCABULARY, make_tree
from tests.gloo_pool import GlooPool

RANKS = 2
KINDS = ("none", "telar", "deepspeed")


class Commits(Messages):
    """Commits a step once the files of all ranks lie in storage, as the controller does."""

    def __init__(self, storage: Storage, rank: int) -> None:
        self._storage, self._rank = storage, rank
        self.committed, self.problems = 0, []

    def problem(self, text: str) -> None:
        """Kept for the report."""
        self.problems.append(text)

    def rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """The last rank to report commits; COMMIT is created once."""
        own = {"rank": file.rank, "path": file.path, "bytes": file.bytes, "digest": file.digest}
        self._storage.write_text(f"reported-{step}/{file.rank}", json.dumps(own))
        if len(self._storage.names(f"reported-{step}")) < world_size:
            return
        if not self._storage.create(f"committing-{step}", b""):
            return
        found = [self._storage.read_text(f"reported-{step}/{rank}") for rank in range(world_size)]
        files = [commit.RankFile(**json.loads(text)) for text in found]
        commit.commit(self._storage.child("run", "checkpoints"), step, attempt, files, world_size, extra)
        self.committed += 1


def blocks(tree: dict[str, Any], folder: str, repeats: int, steps: int, every: int) -> dict[str, Any]:
    """On each rank: seconds of every block by kind, and bytes of one checkpoint of each kind."""
    import torch.distributed as dist

    from model.engine import create_engine
    from tests.test_engine import make_batch

    config = parse_config(tree, "bench")
    engine = create_engine(config, VOCABULARY, 0)
    rank, storage = dist.get_rank(), Storage(folder)
    task = RankTask(config, folder, "run", "", 1, rank, RANKS, None)
    manifest = SimpleNamespace(digest="", tokenizer_digest="", vocabulary_size=VOCABULARY)
    commits = Commits(storage, rank)
    reporter = RankReporter(engine, task, manifest, commits, Progress())
    reporter.data_state = lambda: {"quarantined": []}
    done, seconds = 0, {kind: [] for kind in KINDS}
    for repeat in range(repeats + 1):
        for kind in KINDS:
            dist.barrier()
            started = time.perf_counter()
            for number in range(1, steps + 1):
                done += 1
                engine.train_step([make_batch(rank, done)], done, 1e-4)
                if number % every != every // 2:
                    continue
                if kind == "telar":
                    reporter.checkpoint(done, 0)
                elif kind == "deepspeed":
                    engine.deepspeed.save_checkpoint(f"{folder}/deepspeed", tag=f"step-{done}")
            dist.barrier()
            if repeat:
                seconds[kind].append(time.perf_counter() - started)
            reporter.close()
            dist.barrier()
            found = _bytes(folder)
            if rank == 0:
                # What lies there is weighed once and takes no place afterwards.
                for name in ("run", "deepspeed"):
                    shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
            dist.barrier()
            if kind != "none":
                seconds.setdefault(f"bytes of {kind}", []).append(found // (steps // every))
    engine.close()
    return {"seconds": seconds, "problems": commits.problems, "parameters": engine.parameter_count}


def _bytes(folder: str) -> int:
    files = (path for name in ("run", "deepspeed") for path in Path(folder, name).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.checkpoint", description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="of a block")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-checkpoint.json"))
    options = parser.parse_args()
    tree = make_tree(RANKS, 1, 1, 1, "fp32", options.d_model)
    pool = GlooPool(timeout_seconds=3600)
    try:
        with tempfile.TemporaryDirectory(prefix="telar-bench-") as folder:
            arguments = (tree, folder, options.repeats, options.steps, options.every)
            found = pool.run(RANKS, blocks, *arguments)[0]
    finally:
        pool.close()
    seconds, checkpoints = found["seconds"], options.steps // options.every
    costs = {
        kind: [(some - none) / checkpoints for some, none in zip(seconds[kind], seconds["none"], strict=True)]
        for kind in KINDS[1:]
    }
    step = spread([each / options.steps for each in seconds["none"]])
    between = f"{step.low:.3f} to {step.high:.3f}"
    print(f"{found['parameters']:,} parameters, {RANKS} ranks, step {step.middle:.3f} s ({between})\n")
    print("| checkpoints by | waits per checkpoint, s | of the time at one per 20 steps | bytes |\n|---|---|---|---|")
    for kind, values in costs.items():
        cost = spread(values)
        share = [100 * value / (20 * step.middle) for value in (cost.middle, cost.low, cost.high)]
        print(
            f"| {kind} | {cost.middle:.3f} ({cost.low:.3f} to {cost.high:.3f}) | {share[0]:.1f}% ({share[1]:.1f} to "
            f"{share[2]:.1f}) | {found['seconds'][f'bytes of {kind}'][-1]:,} |"
        )
    times = ratio(costs["deepspeed"], costs["telar"])
    print(f"\nDeepSpeed's costs {times.middle:.1f} times Telar's ({times.low:.1f} to {times.high:.1f})")
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**vars(options), "out": str(options.out)},
        **found,
        "hardware": hardware(),
        "versions": versions(),
    }
    options.out.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
