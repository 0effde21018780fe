"""All benchmarks one after the other at small sizes: `python -m tests.bench.summary` (`make bench`).

Leaves what each one leaves, its output, and summary.json and summary.md with one line per figure. A benchmark that
fails is in the table with its last line; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bench import checkpoint, recovery, train
from tests.bench.figures import best_peer, ratio, spread
from tests.bench.result import finish, rows, show

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 5400
Content = dict[str, Any]
# Name -> its options at small sizes; data writes into a folder, the others one JSON.
SMALL: dict[str, list[str]] = {
    "data": ["--workloads", "1", "--repeats", "3", "--peers", "hf_stream"],
    "attention": ["--lengths", "1024,4096", "--repeats", "3"],
    "generate": ["--batches", "1,32", "--repeats", "3"],
    "train": ["--sizes", "small", "--repeats", "3"],
    "checkpoint": ["--d-model", "128", "--layers", "2", "--repeats", "4"],
    "recovery": ["--repeats", "1"],
}
Figure = tuple[str, str]


def data(content: Content) -> list[Figure]:
    """Telar's rate per CPU second over the best peer's."""
    rates: dict[str, list[float]] = {}
    for run in content["runs"]:
        if run["workload"] == 1 and "tokens_per_cpu_second" in run["result"]:
            rates.setdefault(run["loader"], []).append(run["result"]["tokens_per_cpu_second"])
    peer = best_peer(rates, ["telar", "telar_loader"])
    if peer is None or "telar" not in rates:
        return [("loader's tokens per CPU second", "nothing to compare")]
    return [(f"loader's tokens per CPU second, times {peer}'s", show(ratio(rates["telar"], rates[peer]), 1))]


def attention(content: Content) -> list[Figure]:
    """Each kind's speed over full attention's at the greatest length that both have."""
    seconds = {(run["kind"], run["tokens"]): run["seconds"] for run in content["runs"]}
    most = max(tokens for kind, tokens in seconds if kind == "full")
    return [
        (f"{kind} attention at {most:,} tokens, times full's speed", show(ratio(seconds["full", most], found)))
        for (kind, tokens), found in seconds.items()
        if tokens == most and kind != "full"
    ]


def generate(content: Content) -> list[Figure]:
    """Tokens per second over transformers'."""
    return [
        (
            f"generation, {run['model']} at batch {run['batch']}, times transformers' tokens/s",
            show(ratio(run["tokens_per_second"]["telar"], run["tokens_per_second"]["transformers"])),
        )
        for run in content["runs"]
    ]


def training(content: Content) -> list[Figure]:
    """Step time over the bare loop's."""
    found = []
    for size, ways in content["sizes"].items():
        seconds = {way: [run["seconds"] for run in runs] for way, runs in ways.items()}
        step = 1e3 * spread(seconds["loop"]).middle
        found += [
            (f"{way} over a bare loop, step of {step:.0f} ms ({size})", train.percent(each, seconds["loop"]))
            for way, each in seconds.items()
            if way != "loop"
        ]
    return found


def checkpoints(content: Content) -> list[Figure]:
    """What Telar's cost and how much more DeepSpeed's do."""
    paid = checkpoint.costs(content["seconds"], content["settings"]["steps"])
    every = checkpoint.EVERY
    return [
        (f"a checkpoint per {every} steps costs", show(spread(paid["telar"]["percent"]), 1, "%")),
        ("a snapshot of every step costs", show(spread(paid["snapshots"]["percent"]), 1, "%")),
        (
            "DeepSpeed's checkpoint, times Telar's cost",
            checkpoint.quotient(paid["deepspeed"]["seconds"], paid["telar"]["seconds"]),
        ),
    ]


def recoveries(content: Content) -> list[Figure]:
    """Seconds to the next step, and those of the others over Telar's."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in content["runs"]:
        for kill in recovery.KILLS:
            seconds.setdefault((kill, run["way"]), []).append(run["found"][kill]["next"])
    found = []
    for (kill, way), each in seconds.items():
        times = "" if way == "telar" else f", times Telar's: {show(ratio(each, seconds[kill, 'telar']), 1)}"
        found.append((f"{kill} killed, {way}: s to the next step", show(spread(each), 1) + times))
    return found


FIGURES: dict[str, Callable[[Content], list[Figure]]] = {
    "data": data,
    "attention": attention,
    "generate": generate,
    "train": training,
    "checkpoint": checkpoints,
    "recovery": recoveries,
}


def run(name: str, out: Path) -> dict[str, Any]:
    """One benchmark: its content, or why there is none."""
    out.mkdir(parents=True, exist_ok=True)
    place = out / "data" if name == "data" else out / f"{name}.json"
    command = [sys.executable, "-m", f"tests.bench.{name}", *SMALL[name], "--out", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {LIMIT_SECONDS} s"}
    if done.returncode:
        last = (out / f"{name}.log").read_text().strip().splitlines()
        return {"failed": last[-1][:200] if last else f"exit status {done.returncode}"}
    found = json.loads((place / "results.json" if name == "data" else place).read_text())
    return {"content": found, "seconds": time.perf_counter() - started}


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per figure."""
    lines = []
    for name, each in found.items():
        figures = [("", f"failed: {each['failed']}")] if "failed" in each else FIGURES[name](each["content"])
        lines += [[name, *(cell.replace("|", "/") for cell in figure)] for figure in figures]
    return rows(("benchmark", "figure", "median (least to greatest)"), lines)


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.summary", description=__doc__)
    parser.add_argument("--only", default=",".join(SMALL), help="names, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/summary.json"))
    options = parser.parse_args()
    found = {}
    for name in options.only.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = run(name, options.out.resolve().parent)
    kept = {name: {key: value for key, value in each.items() if key != "content"} for name, each in found.items()}
    finish(options, {"benchmarks": kept}, table(found))
    return 1 if any("failed" in each for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
