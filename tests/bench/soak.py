"""One elastic run under random kills: `python -m tests.bench.soak` (`make soak`); prints figures, writes one JSON.

For `--minutes`, on a Ray cluster of three nodes, a rank or a node's raylet is killed at random (seeded) moments, every
`--every` seconds on average; a lost node comes back after `--back` seconds. Then the run is stopped, and as many steps
are trained again without kills. Checked, with exit status 1 if not so: the loss of every step, also of those done
twice, is that of the undisturbed run within `--tolerance`; every step saw the same samples, each once; no process is
left.

Goodput is the time of steps that counted (`step_seconds` of the last record of each) over wall time from the end of the
first step to that of the last; so steps done twice, snapshots, checkpoints, detection and restarts are all losses.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.bench.recovery import SECTIONS, lines
from tests.bench.result import finish, rows

NODES, BATCH = 3, 12
RANK_SHARE = 0.5
LEFT_SECONDS = 30.0
MARK = "TELAR_SOAK"


@dataclass(frozen=True)
class Kill:
    """When (seconds after the start), what ("rank" or "node"), and which of those that there are (in [0, 1))."""

    seconds: float
    what: str
    which: float


def plan(seed: int, seconds: float, every: float) -> list[Kill]:
    """Kills with exponential times between them."""
    dice, at, found = random.Random(seed), 0.0, []
    while (at := at + dice.expovariate(1 / every)) < seconds:
        found.append(Kill(at, "rank" if dice.random() < RANK_SHARE else "node", dice.random()))
    return found


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Goodput and what was lost, from the records of metrics.jsonl."""
    last = {record["step"]: record for record in records}
    steps = sorted(last)
    wall = last[steps[-1]]["unix_seconds"] - records[0]["unix_seconds"]
    # The first one was done when the clock started.
    useful = sum(last[step]["step_seconds"] for step in steps[1:])
    times = Counter(record["step"] for record in records)
    return {
        "steps": len(steps),
        "missing": steps[-1] - len(steps),
        "redone": sum(times.values()) - len(times),
        "attempts": len({record["attempt"] for record in records}),
        "wall_seconds": wall,
        "useful_seconds": useful,
        "goodput": useful / wall,
        "replicas": dict(sorted(Counter(last[step]["world_size"] for step in steps).items())),
    }


def difference(found: Mapping[int, Sequence[float]], expected: Mapping[int, Sequence[float]]) -> tuple[float, int]:
    """The greatest difference of a loss from the one expected, and its step; every step must be in both."""
    assert found.keys() == expected.keys(), f"steps differ: {sorted(found.keys() ^ expected.keys())[:9]}"
    return max((abs(value - expected[step][-1]), step) for step, values in found.items() for value in values)


class Injector:
    """Kills what the plan says, and brings nodes back."""

    def __init__(self, cluster: Any, run: Any, back_seconds: float, log: Any) -> None:
        self._cluster, self._run, self._back_seconds, self._log = cluster, run, back_seconds, log
        self._missing: list[float] = []
        self.done: list[dict[str, Any]] = []

    def follow(self, kills: Sequence[Kill], seconds: float) -> None:
        """Until the time is over; the run must not have ended."""
        started, waiting = time.monotonic(), list(kills)
        while (now := time.monotonic() - started) < seconds:
            while self._missing and self._missing[0] <= now:
                self._missing.pop(0)
                self._cluster.add_node()
            # One replica at least has a node.
            if waiting and waiting[0].seconds <= now and (waiting[0].what == "rank" or len(self._cluster.nodes) > 1):
                self._carry_out(waiting.pop(0), now)
            self._run.wait_for(lambda at=now: time.monotonic() - started > at + 0.2, "the time of the next kill")
        for _ in self._missing:
            self._cluster.add_node()

    def _carry_out(self, kill: Kill, now: float) -> None:
        if kill.what == "node":
            node = self._cluster.nodes[int(kill.which * len(self._cluster.nodes))].node_id
            self._cluster.kill_node(node)
            self._missing.append(now + self._back_seconds)
            self._note(kill, now, node[:8])
            return
        alive = [process for process, _ in self._run.ranks() if psutil.pid_exists(process)]
        if not alive:
            # All are gone already: what is left of the attempt before is being cleared.
            self._note(kill, now, "nothing")
            return
        process = alive[int(kill.which * len(alive))]
        os.kill(process, signal.SIGKILL)
        self._note(kill, now, str(process))

    def _note(self, kill: Kill, now: float, victim: str) -> None:
        self.done.append({**asdict(kill), "at": now, "victim": victim})
        self._log(f"{now:6.1f} s: killed {kill.what} {victim}")


def marked(token: str) -> list[int]:
    """Processes that came of this one, also those whose parents were killed: they have its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            inherited = process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if inherited and process.pid != os.getpid():
            found.append(process.pid)
    return found


def soak(options: argparse.Namespace, log: Any) -> dict[str, Any]:
    """Both runs, and what came of them."""
    from tests.elastic_cluster import ElasticCluster

    kills = plan(options.seed, 60 * options.minutes, options.every)
    sections = {**SECTIONS, "tracking": {**SECTIONS["tracking"], "log_samples": True}}
    sections["elastic"] = {**sections["elastic"], "min_replicas": 1, "grow_seconds": options.grow}
    os.environ[MARK] = token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="telar-soak-") as place:
        cluster = ElasticCluster(Path(place), NODES)
        try:
            run = cluster.submit("soak", **sections)
            run.wait_for_step(1)
            injector = Injector(cluster, run, options.back, log)
            injector.follow(kills, 60 * options.minutes)
            run.stop()
            state = run.end(300)
            records = lines(Path(run.folder.url, "metrics.jsonl"))
            found = {**figures(records), "kills": injector.done, "state": state}
            recovered = [event["recovered_seconds"] for event in run.events("recovered")]
            steps = found["steps"]
            log(f"{steps} steps in {found['wall_seconds']:.0f} s; now undisturbed")
            settled = {**sections, "train": {**sections["train"], "steps": steps}}
            settled["elastic"] = {"snapshot_every": 0}
            quiet = cluster.submit("quiet", **settled)
            assert quiet.end(3600) == "finished"
            worst, at = difference(run.losses(), quiet.losses())
            mine, theirs = (each.samples(steps, BATCH) for each in (run, quiet))
            wrong = [step for step in theirs if sorted(mine[step]) != sorted(theirs[step])]
            undisturbed = figures(lines(Path(quiet.folder.url, "metrics.jsonl")))
        finally:
            cluster.close()
    deadline = time.monotonic() + LEFT_SECONDS
    while (left := marked(token)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        **found,
        "recovered_seconds": recovered,
        "undisturbed": undisturbed,
        "largest_difference": worst,
        "at_step": at,
        "steps_with_other_samples": wrong,
        "processes_left": left,
    }


def problems(found: Mapping[str, Any], tolerance: float) -> list[str]:
    """What must not be so."""
    said = []
    if found["state"] != "stopped":
        said.append(f"the run is {found['state']}")
    if found["missing"]:
        said.append(f"{found['missing']} steps are not in metrics.jsonl")
    if found["largest_difference"] > tolerance:
        said.append(f"the loss of step {found['at_step']} differs by {found['largest_difference']:.2e}")
    if found["steps_with_other_samples"]:
        said.append(f"steps {found['steps_with_other_samples'][:9]} saw other samples")
    if found["processes_left"]:
        said.append(f"processes {found['processes_left']} are left")
    return said


def table(found: Mapping[str, Any], said: Sequence[str]) -> list[str]:
    """The figures in Markdown."""
    kills = Counter(kill["what"] for kill in found["kills"] if kill["victim"] != "nothing")
    quiet = found["undisturbed"]
    recovered = sorted(found["recovered_seconds"])
    middle = f"{recovered[len(recovered) // 2]:.1f} (to {recovered[-1]:.1f})" if recovered else "-"
    shapes = ", ".join(f"{steps} on {replicas}" for replicas, steps in found["replicas"].items())
    facts = [
        ("goodput", f"{found['goodput']:.1%} (undisturbed, without snapshots: {quiet['goodput']:.1%})"),
        ("wall time", f"{found['wall_seconds']:.0f} s (undisturbed: {quiet['wall_seconds']:.0f} s)"),
        ("kills", ", ".join(f"{count} of a {what}" for what, count in sorted(kills.items())) or "none"),
        ("attempts", str(found["attempts"])),
        ("noticed to next step, s", middle),
        ("steps, by replicas", shapes),
        ("steps done twice", str(found["redone"])),
        ("largest difference of a loss", f"{found['largest_difference']:.1e} (step {found['at_step']})"),
        ("steps with other samples", str(len(found["steps_with_other_samples"]))),
        ("processes left", str(len(found["processes_left"]))),
    ]
    return [*rows(("", ""), facts), "", "; ".join(said) or "All checks hold."]


def main() -> int:
    """Run, check, print, write; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between kills")
    parser.add_argument("--back", type=float, default=30.0, help="seconds until a lost node is back")
    parser.add_argument("--grow", type=float, default=5.0, help="elastic.grow_seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest difference of a loss, nats per token")
    parser.add_argument("--out", type=Path, default=Path("bench-soak.json"))
    options = parser.parse_args()
    found = soak(options, lambda line: print(line, file=sys.stderr, flush=True))
    said = problems(found, options.tolerance)
    finish(options, found, table(found, said))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
