"""What checkpoints cost training: `python -m tests.bench.checkpoint`; prints a table, writes one JSON.

Two ranks on two Ray nodes train one model over gloo with the parts that a run has: `jobs.rank.RankReporter`, messages
to a controller that commits, vaults on both nodes. Blocks of steps follow each other in turns: with nothing, with a
checkpoint (copied between two steps, uploaded and committed behind the training thread's back), with a snapshot in two
nodes' memory after every step (`elastic.snapshot_every: 1`), and with DeepSpeed's `save_checkpoint` of the same engine.
What a kind costs is the wall time of its block minus that of the block with nothing in the same repeat. A block ends
when its upload has, so that what an upload takes from the steps beside it is counted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.network import free_ports
from cluster.storage import Storage
from configs.load import parse_config
from configs.schema import RunConfig
from tests.bench.figures import Spread, ratio, spread
from tests.bench.result import finish, rows, show

RANKS, RUN, VOCABULARY = 2, "bench", 8192
KINDS = ("none", "telar", "snapshots", "deepspeed")
EVERY = 20


def make_config(d_model: int, layers: int, sequences: int, tokens: int, storage: str, snapshots: int) -> RunConfig:
    """Two replicas with ZeRO-1, one micro-batch each; no data are read."""
    tree = {
        "run": {"name": RUN, "storage": storage},
        "cluster": {"device": "cpu"},
        "data": {
            "corpora": [{"name": "none", "kind": "text", "path": "/nowhere", "target": "{text}"}],
            "tokenizer": {"vocabulary_size": VOCABULARY},
            "source_tokens": tokens,
            "target_tokens": tokens,
        },
        "model": {
            "d_model": d_model,
            "heads": max(1, d_model // 64),
            "d_ff": 4 * d_model,
            "encoder_layers": layers,
            "decoder_layers": layers,
        },
        "parallelism": {"data": RANKS},
        "train": {"steps": 10**6, "global_batch_sequences": RANKS * sequences, "micro_batch_sequences": sequences},
        "elastic": {"snapshot_every": snapshots},
        "tracking": {"log_every_steps": 10**6, "gauges": False, "status_page": "off"},
    }
    return parse_config(tree, "bench")


class Books:
    """What of the controller the ranks talk to: the run's books, which commit."""

    def __init__(self, config: RunConfig) -> None:
        from jobs.ledger import Ledger

        self._ledger = Ledger(Storage(config.run.storage), RUN, config)
        self._problems: list[str] = []

    def begin(self) -> int:
        """The number of the attempt."""
        return self._ledger.begin_attempt()

    def record_steps(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """As `jobs.controller` does."""
        for record in records:
            self._ledger.record_step(record)
        return self._ledger.steps_known(records[-1]["attempt"])

    def record_rank_file(self, *arguments: Any) -> None:
        """As `jobs.controller` does."""
        self._ledger.record_rank_file(*arguments)

    def record_problem(self, text: str) -> None:
        """Kept for the report."""
        self._problems.append(text)

    def found(self) -> tuple[dict[str, Any], list[str]]:
        """The status, and what went wrong."""
        return self._ledger.status, self._problems


class Rank:
    """One rank in its process."""

    def node(self) -> str:
        """Where it is."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def measure(
        self, configs: Mapping[str, RunConfig], rank: int, port: int, attempt: int, books: Any, vault: Any, plan: Any
    ) -> dict[str, Any]:
        """Seconds of all blocks by kind, those spent inside the calls, and bytes of one checkpoint of DeepSpeed."""
        import os

        import torch.distributed as dist

        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        from jobs.loop import StepRecord
        from jobs.progress import Progress
        from jobs.rank import RankReporter, RankTask
        from jobs.worker import ControllerMessages
        from model.engine import create_engine

        config = configs["plain"]
        engine = create_engine(config, VOCABULARY, 0)
        manifest = SimpleNamespace(digest="", tokenizer_digest="", vocabulary_size=VOCABULARY)
        reporters = {}
        for name, each in configs.items():
            task = RankTask(each, each.run.storage, RUN, "", attempt, rank, RANKS, None)
            reporters[name] = RankReporter(engine, task, manifest, ControllerMessages(books, vault), Progress())
            reporters[name].data_state = lambda: {"quarantined": []}
        theirs = Path(config.run.storage, "deepspeed")
        batch = make_batch(config, rank, VOCABULARY)
        done, seconds, inside = 0, {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
        found_bytes = 0
        for repeat in range(plan.repeats + 1):
            turn = repeat % len(KINDS)
            # No kind always has the same place in the row.
            for kind in KINDS[turn:] + KINDS[:turn]:
                reporter, calls = reporters["remembering" if kind == "snapshots" else "plain"], 0.0
                dist.barrier()
                started = time.perf_counter()
                for number in range(1, plan.steps + 1):
                    done += 1
                    result = engine.train_step([batch], done, 1e-4, before_update=reporter.before_update)
                    record = StepRecord(
                        step=done,
                        tokens=done,
                        loss=result.loss,
                        nll=result.nll,
                        learning_rate=1e-4,
                        grad_norm=result.grad_norm,
                        tokens_per_second=1.0,
                        data_wait_seconds=0.0,
                        step_seconds=1.0,
                        world_size=RANKS,
                        attempt=attempt,
                        unix_seconds=time.time(),
                        memory_bytes=0,
                    )
                    called = time.perf_counter()
                    reporter.on_step(record)
                    if number == plan.at and kind == "telar":
                        reporter.checkpoint(done, done)
                    elif number == plan.at and kind == "deepspeed":
                        engine.deepspeed.save_checkpoint(str(theirs), tag=f"step-{done}")
                    calls += time.perf_counter() - called
                reporter.close()
                dist.barrier()
                if repeat:
                    seconds[kind].append(time.perf_counter() - started)
                    inside[kind].append(calls)
                if rank == 0 and kind == "deepspeed":
                    found_bytes = sum(path.stat().st_size for path in theirs.rglob("*") if path.is_file())
                    shutil.rmtree(theirs)
                dist.barrier()
        engine.close()
        return {
            "seconds": seconds,
            "inside": inside,
            "deepspeed_bytes": found_bytes,
            "parameters": engine.parameter_count,
        }


def make_batch(config: RunConfig, index: int, vocabulary: int) -> Any:
    """A micro-batch of random tokens, every row full."""
    import torch

    from model.batch import ModelBatch

    random = torch.Generator().manual_seed(index)
    count, widths = config.train.micro_batch_sequences, (config.data.source_tokens, config.data.target_tokens)
    inputs = []
    for width in widths:
        tokens = torch.randint(3, vocabulary, (count, width), generator=random, dtype=torch.int32)
        places = torch.arange(width, dtype=torch.int32).repeat(count, 1)
        inputs += [tokens, places, torch.ones_like(tokens)]
    labels = torch.randint(3, vocabulary, (count, widths[1]), generator=random, dtype=torch.int32)
    return ModelBatch(index, tuple(inputs), labels, torch.ones(labels.shape))


def run(configs: Mapping[str, RunConfig], plan: argparse.Namespace) -> dict[str, Any]:
    """On a cluster of two nodes: what rank 0 found, Telar's bytes and problems."""
    import json

    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jobs.vaults import NAMESPACE, Vaults

    node = {"num_cpus": 1, "object_store_memory": plan.object_store_mebibytes * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace=NAMESPACE)
        nodes = [cluster.add_node(**node).node_id for _ in range(RANKS)]
        cluster.wait_for_nodes()
        environment = {"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}}
        books = ray.remote(Books).options(name=f"{RUN}/controller", num_cpus=0, max_concurrency=16)
        books = books.remote(configs["plain"])
        attempt, vaults = ray.get(books.begin.remote()), Vaults(RUN)
        vaults.begin(attempt, nodes)
        ranks = [
            ray.remote(Rank)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), runtime_env=environment)
            .remote()
            for node in nodes
        ]
        assert ray.get([rank.node.remote() for rank in ranks]) == nodes
        (port,) = free_ports(1)
        found = ray.get(
            [
                rank.measure.remote(configs, number, port, attempt, books, vaults.by_node[nodes[number]], plan)
                for number, rank in enumerate(ranks)
            ]
        )[0]
        _, problems = ray.get(books.found.remote())
        vaults.close()
        ray.kill(books)
    finally:
        ray.shutdown()
        cluster.shutdown()
    lines = Path(configs["plain"].run.storage, RUN, "events.jsonl").read_text().splitlines()
    committed = [event for event in map(json.loads, lines) if event["event"] == "committed"]
    # One more than repeats: the first does not count.
    assert len(committed) == plan.repeats + 1, f"{len(committed)} of {plan.repeats + 1} checkpoints were committed"
    return {**found, "telar_bytes": committed[-1]["bytes"], "problems": problems}


def costs(seconds: Mapping[str, Sequence[float]], steps: int) -> dict[str, Any]:
    """What each kind costs, from the seconds of its blocks by repeat, and a step's seconds (spread).

    Seconds per checkpoint, for snapshots per step; percent of the steps' time at one checkpoint per EVERY steps.
    """
    step = spread([each / steps for each in seconds["none"]])
    found: dict[str, Any] = {"step": step}
    for kind in KINDS[1:]:
        times = steps if kind == "snapshots" else 1
        paid = [(some - none) / times for some, none in zip(seconds[kind], seconds["none"], strict=True)]
        every = 1 if kind == "snapshots" else EVERY
        found[kind] = {"seconds": paid, "percent": [100 * each / (every * step.middle) for each in paid]}
    return found


def quotient(one: Sequence[float], other: Sequence[float]) -> str:
    """`one` / `other` by pairs; by medians where some of `other` is lost in the noise."""
    if min(other) > 0:
        return show(ratio(one, other), 1)
    below = sum(each <= 0 for each in other)
    middle = spread(other).middle
    said = f"{below} of {len(other)} repeats show no cost of Telar's at all"
    return f"{spread(one).middle / middle:,.1f} by medians ({said})" if middle > 0 else f"not measurable: {said}"


def table(found: Mapping[str, Any], steps: int) -> list[str]:
    """The figures in Markdown."""
    paid = costs(found["seconds"], steps)
    step: Spread = paid["step"]
    names = {
        "telar": ("Telar's checkpoint", f"{found['telar_bytes']:,}"),
        "snapshots": ("Telar's snapshot of every step", "-"),
        "deepspeed": ("DeepSpeed's save_checkpoint", f"{found['deepspeed_bytes']:,}"),
    }
    lines = []
    for kind, (name, size) in names.items():
        inside = [some - none for some, none in zip(found["inside"][kind], found["inside"]["none"], strict=True)]
        times = steps if kind == "snapshots" else 1
        cost = show(spread(paid[kind]["seconds"]), 3), show(spread(paid[kind]["percent"]), 1, "%")
        lines.append([name, *cost, show(spread([each / times for each in inside]), 3), size])
    header = ("", "costs each, s", f"of the steps' time (one per {EVERY}; snapshots: each)", "in the call, s", "bytes")
    # What one configuration with both pays.
    both = [a + b for a, b in zip(paid["telar"]["percent"], paid["snapshots"]["percent"], strict=True)]
    inside = [[a - b for a, b in zip(found["inside"][k], found["inside"]["none"], strict=True)] for k in KINDS]
    return [
        f"{found['parameters']:,} parameters, {RANKS} ranks, ZeRO-1; a step takes {show(step, 3)} s",
        "",
        *rows(header, lines),
        "",
        f"Snapshots of every step and a checkpoint per {EVERY} steps: {show(spread(both), 1, '%')} of the steps' time.",
        f"DeepSpeed's costs {quotient(paid['deepspeed']['seconds'], paid['telar']['seconds'])} times Telar's; the "
        f"training thread is in the call {quotient(inside[3], inside[1])} times as long.",
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.checkpoint", description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder, and of the decoder")
    parser.add_argument("--sequences", type=int, default=4, help="of a rank in a step")
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence, on either side")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--at", type=int, default=3, help="step of a block after which it makes its checkpoint")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--object-store-mebibytes", type=int, default=1024, help="of a node")
    parser.add_argument("--out", type=Path, default=Path("bench-checkpoint.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="telar-bench-") as folder:
        sizes = (options.d_model, options.layers, options.sequences, options.tokens, folder)
        configs = {"plain": make_config(*sizes, 0), "remembering": make_config(*sizes, 1)}
        found = run(configs, options)
    finish(options, found, table(found, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
