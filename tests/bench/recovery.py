"""Time from a SIGKILL to the next optimizer step: `python -m tests.bench.recovery`; prints a table, writes one JSON.

On one Ray cluster of three nodes (`ray.cluster_utils.Cluster`), in turns: an elastic run of Telar, Ray Train's elastic
TorchTrainer as it comes, and the same with shorter waits (RAY_TRAIN_*, monitor). Each trains one model
with a checkpoint every EVERY steps; after `--settle` seconds of training a rank is killed, after as many again a node's
raylet, so that two replicas go on. Ray's own health checks are the shortened ones of tests/elastic_cluster.py for all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import ratio, spread
from tests.bench.ray_train import RANKS, STEPS, STOP
from tests.bench.result import finish, rows, show

ROOT = Path(__file__).resolve().parents[2]
NODES, EVERY = 3, 10
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.1
KILLS = ("rank", "node")
# Way -> options of its driver, its environment; Telar is driven from here.
WAYS: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "telar": ((), {}),
    "ray train": ((), {}),
    "ray train, tuned": (
        ("--monitor-seconds", "5"),
        {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
    ),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"d_model": 128, "heads": 4, "d_ff": 512, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.1},
    # Three replicas and two share it evenly.
    "train": {"steps": 10**6, "global_batch_sequences": 12, "micro_batch_sequences": 2},
    "checkpoint": {"every_steps": EVERY},
    "elastic": {"min_replicas": 2, "snapshot_every": 1, "max_restarts": 20},
    "tracking": {"log_samples": False, "status_page": "off", "log_every_steps": 1000},
}


def lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of the whole lines of a file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Telar:
    """An elastic run in its controller."""

    def __init__(self, cluster: Any, name: str, folder: Path) -> None:
        self._run = cluster.submit(name, **SECTIONS)

    def steps(self) -> list[dict[str, Any]]:
        """Records of steps, with `attempt`, `step`, `world_size` and `unix_seconds` (when it was done)."""
        return lines(Path(self._run.folder.url, "metrics.jsonl"))

    def rank(self, number: int) -> tuple[int, str]:
        """Process and node of a rank of the latest attempt."""
        return self._run.ranks()[number]

    def end(self) -> None:
        """Stop it."""
        self._run.stop()
        self._run.end()


class RayTrain:
    """A driver of Ray Train in a process of its own."""

    def __init__(self, cluster: Any, name: str, folder: Path, way: str) -> None:
        from configs.load import to_yaml
        from jobs.controller import read_config
        from tests.elastic_cluster import write_run

        write_run(cluster.storage, cluster.code, name, NODES, SECTIONS)
        self._folder = folder / name
        self._folder.mkdir()
        (self._folder / "config.yaml").write_text(to_yaml(read_config(cluster.storage, name)))
        options, environment = WAYS[way]
        command = [sys.executable, "-m", "tests.bench.ray_train", cluster.address, str(self._folder)]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1", **environment}
        self._log = (self._folder / "driver.log").open("w")
        self._process = subprocess.Popen(
            [*command, str(self._folder / "config.yaml"), *options],
            cwd=self._folder,
            env={**os.environ, **own},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def steps(self) -> list[dict[str, Any]]:
        """As of `Telar`."""
        if self._process.poll() is not None:
            raise SystemExit(f"Ray Train ended:\n{(self._folder / 'driver.log').read_text()[-2000:]}")
        return lines(self._folder / STEPS)

    def rank(self, number: int) -> tuple[int, str]:
        """As of `Telar`."""
        found = lines(self._folder / RANKS)
        latest = max(record["attempt"] for record in found)
        (record,) = (each for each in found if each["attempt"] == latest and each["rank"] == number)
        return record["pid"], record["node"]

    def end(self) -> None:
        """Stop it."""
        (self._folder / STOP).touch()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Poll until there is something; SystemExit when it takes longer."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        time.sleep(POLL_SECONDS)
    return found


def recovery(steps: Sequence[dict[str, Any]], killed: float) -> dict[str, Any] | None:
    """What a kill at `killed` (Unix seconds) cost, from records of steps; None while no attempt has caught up.

    `next`: seconds to the end of the first step of a later attempt; `caught_up`: to the end of the first step that had
    not been done before; `redone`: steps done twice.
    """
    before = [record for record in steps if record["unix_seconds"] <= killed]
    attempt = before[-1]["attempt"]
    # A step that was going on at the kill may still end.
    done = max(record["step"] for record in steps if record["attempt"] == attempt)
    after = [record for record in steps if record["attempt"] != attempt and record["unix_seconds"] > killed]
    if not after or after[-1]["step"] <= done:
        return None
    first, new = after[0], next(record for record in after if record["step"] > done)
    return {
        "next": first["unix_seconds"] - killed,
        "caught_up": new["unix_seconds"] - killed,
        "redone": done - first["step"] + 1,
        "replicas": first["world_size"],
    }


def turn(cluster: Any, way: str, repeat: int, folder: Path, settle_seconds: float) -> dict[str, dict[str, Any]]:
    """One run of a way, with both kills; the cluster has all its nodes again afterwards."""
    name = f"{way.replace(' ', '-').replace(',', '')}-{repeat}"
    run = Telar(cluster, name, folder) if way == "telar" else RayTrain(cluster, name, folder, way)
    found = {}
    try:
        for kill in KILLS:

            def settled() -> bool:
                done = run.steps()
                mine = [record for record in done if record["attempt"] == done[-1]["attempt"]]
                if not mine or mine[-1]["world_size"] != NODES:
                    return False
                return mine[-1]["unix_seconds"] - mine[0]["unix_seconds"] > settle_seconds

            wait_for(settled, f"{settle_seconds:.0f} s of training of {name}", WAIT_SECONDS + settle_seconds)
            process, node = run.rank(1)
            killed = time.time()
            if kill == "rank":
                os.kill(process, signal.SIGKILL)
            else:
                cluster.kill_node(node)
            found[kill] = wait_for(lambda at=killed: recovery(run.steps(), at), f"{name} after the loss of a {kill}")
    finally:
        run.end()
    cluster.add_node()
    # A run that begins before all is free again begins smaller.
    wait_for(lambda: cluster.ray.available_resources().get("CPU", 0) >= NODES, "all nodes to be free")
    return found


def table(runs: Sequence[dict[str, Any]], settle_seconds: float) -> list[str]:
    """The figures in Markdown."""
    ways = list(dict.fromkeys(run["way"] for run in runs))
    found = {
        (way, kill, figure): [run["found"][kill][figure] for run in runs if run["way"] == way]
        for way in ways
        for kill in KILLS
        for figure in ("next", "caught_up", "redone")
    }
    cells = []
    for kill in KILLS:
        for way in ways:
            seconds = found[way, kill, "next"]
            times = "" if way == "telar" else f"{show(ratio(seconds, found['telar', kill, 'next']), 1)}"
            cells.append(
                [
                    kill,
                    way,
                    show(spread(seconds), 1),
                    show(spread(found[way, kill, "caught_up"]), 1),
                    show(spread(found[way, kill, "redone"]), 0),
                    times,
                ]
            )
    header = ("killed", "way", "next step, s", "first new step, s", "steps redone", "times Telar's")
    return [
        f"SIGKILL of a rank, or of a node's raylet (3 -> 2 replicas), after {settle_seconds:g} s of training; a "
        f"checkpoint every {EVERY} steps, Telar's snapshot every step",
        "",
        *rows(header, cells),
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recovery", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons; telar is needed")
    # Telar's standbys start after 15 s of an attempt and import for some more.
    parser.add_argument("--settle", type=float, default=40.0, help="seconds of training before each kill")
    parser.add_argument("--out", type=Path, default=Path("bench-recovery.json"))
    options = parser.parse_args()
    from tests.elastic_cluster import ElasticCluster

    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="telar-bench-") as place:
        cluster = ElasticCluster(Path(place), NODES)
        try:
            for repeat in range(options.repeats):
                for way in options.ways.split(";"):
                    found = turn(cluster, way, repeat, Path(place), options.settle)
                    runs.append({"way": way, "repeat": repeat, "found": found})
                    print(f"#{repeat} {way}: {json.dumps(found)}", file=sys.stderr, flush=True)
        finally:
            cluster.close()
    finish(options, {"runs": runs}, table(runs, options.settle))
    return 0


if __name__ == "__main__":
    sys.exit(main())
