"""What Telar adds to a training step: `python -m tests.bench.train`; prints a table, writes one JSON.

One rank on one thread trains one decoder of GPT-2's shape, in turns: by `telar submit` on an embedded Ray cluster
(streamed data, controller, metrics, checkpoints on), by `python -m jobs.train_local` (the same without Ray; `--no-ray`
leaves the first out), by a bare PyTorch loop over the same model and the same samples in memory, by a loop in nanoGPT's
way and by transformers' Trainer (in an environment of its own) with models of the same shape. A step's seconds are wall
time from the end of step WARM to that of the last step, by their number; checkpoints lie in between.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.bench.environments import NotInstalled, ensure
from tests.bench.figures import Spread, ratio, spread
from tests.bench.result import finish, rows, show

ROOT = Path(__file__).resolve().parents[2]
WARM, LIMIT_SECONDS = 10, 1800
WAYS = ("telar", "telar, no Ray", "loop", "nanogpt", "hf")
# Width, layers, rows; on one core of an EPYC some 100 and some 500 ms. Rows of TOKENS tokens are full.
SIZES = {"small": (128, 4, 8), "large": (256, 6, 8)}
TOKENS, VOCABULARY, HEAD_WIDTH = 128, 2048, 64


def make_tree(size: str, steps: int, storage: str) -> dict[str, Any]:
    """The configuration without a run's name; what the evaluation and the report do after training is little."""
    width, layers, count = SIZES[size]
    corpus = {"name": "prose", "kind": "python", "path": "python://stdlib", "target": "{text}", "continuation": True}
    return {
        "run": {"storage": storage, "seed": 1},
        "cluster": {"device": "cpu", "local_cpus": 2},
        "data": {
            "layout": "sequence",
            "packing": "chunk",
            "corpora": [corpus],
            "tokenizer": {"vocabulary_size": VOCABULARY},
            "target_tokens": TOKENS,
        },
        "model": {
            "architecture": "decoder",
            "positions": "learned",
            "max_positions": TOKENS,
            "d_model": width,
            "heads": width // HEAD_WIDTH,
            "d_ff": 4 * width,
            "decoder_layers": layers,
            "norm_placement": "pre",
            "feed_forward": "gelu",
            "scale_embeddings": False,
            "initialisation": "normal",
            "dropout": 0.0,
        },
        "optimizer": {"schedule": "constant", "learning_rate": 6e-4, "warmup_steps": 10, "betas": [0.9, 0.95]},
        "train": {
            "steps": steps,
            "global_batch_sequences": count,
            "micro_batch_sequences": count,
            "label_smoothing": 0.0,
        },
        "checkpoint": {"every_steps": steps // 3},
        "evaluate": {"likelihood_records": 4, "slice_records": 4, "workers": 1, "bootstrap_rounds": 100},
    }


class Bench:
    """The runs of one size in a folder of their own."""

    def __init__(self, size: str, steps: int, folder: Path, interpreter: Path | None) -> None:
        self._folder, self._interpreter = folder, interpreter
        self._tree = make_tree(size, steps, str(folder / "runs"))
        (folder / "bench.yaml").write_text(yaml.safe_dump(self._tree))

    def measure(self, way: str, repeat: int) -> dict[str, Any]:
        """Seconds of a step, and losses."""
        if way in ("telar", "telar, no Ray"):
            name = f"{'ray' if way == 'telar' else 'local'}-{repeat}"
            if way == "telar":
                words = ["jobs.cli", "submit", "bench.yaml", "--embedded", "--wait", "--down"]
            else:
                words = ["jobs.train_local", "bench.yaml"]
            self._call(sys.executable, *words, "--set", f"run.name={name}")
            lines = (self._folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            ends = [record["unix_seconds"] for record in records]
            waits = sum(record["data_wait_seconds"] for record in records[WARM:]) / (len(ends) - WARM)
            return {
                "seconds": (ends[-1] - ends[WARM - 1]) / (len(ends) - WARM),
                "losses": [record["loss"] for record in records],
                "data_wait_seconds": waits,
            }
        if not (self._folder / "shape.json").exists():
            self._export()
        interpreter = self._interpreter if way == "hf" else sys.executable
        output = self._call(str(interpreter), "tests.bench.train_loops", way, str(self._folder))
        return json.loads(output.strip().splitlines()[-1])

    def _export(self) -> None:
        """The samples of a run, step by step, as plain arrays."""
        from cluster.storage import Storage
        from configs.load import parse_config
        from data.loader import Loader
        from data.manifest import Manifest
        from data.shard_server import plain_opener
        from jobs.batches import to_model

        place = Storage(str(self._folder / "runs"))
        (digest,) = place.names("data")
        manifest, config = Manifest.read(place, f"data/{digest}"), parse_config(self._tree, "bench")
        arrays: dict[str, list[np.ndarray]] = {}
        with closing(Loader(manifest, config, plain_opener(place, manifest), 0, 1)) as loader:
            for _ in range(config.train.steps):
                (batch,) = map(to_model, loader.next_step())
                fields = {f"input{number}": tensor for number, tensor in enumerate(batch.inputs)}
                for name, tensor in {**fields, "labels": batch.labels, "loss_weight": batch.loss_weight}.items():
                    # The loader writes its arrays over.
                    arrays.setdefault(name, []).append(tensor.numpy().copy())
        np.savez(self._folder / "samples.npz", **{name: np.stack(each) for name, each in arrays.items()})
        model = self._tree["model"]
        shape = {
            "config": self._tree,
            "vocabulary": manifest.vocabulary_size,
            "width": model["d_model"],
            "layers": model["decoder_layers"],
            "heads": model["heads"],
            "tokens": TOKENS,
            "warm": WARM,
        }
        (self._folder / "shape.json").write_text(json.dumps(shape))

    def _call(self, interpreter: str, *words: str) -> str:
        own = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TELAR_HOME": str(self._folder / "home"),
            "TELAR_SHARD_CACHE": str(self._folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            # Ray would run its workers at niceness 15, and all else that runs here would come before them.
            "RAY_worker_niceness": "0",
        }
        done = subprocess.run(
            [interpreter, "-W", "ignore", "-m", *words],
            cwd=self._folder,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The greatest difference of the losses of a step."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def percent(one: Sequence[float], other: Sequence[float]) -> str:
    """How much longer `one` takes than `other`, by pairs."""
    times = ratio(one, other)
    return show(Spread(*(100 * (each - 1) for each in (times.middle, times.low, times.high)), times.count), 1, "%")


def table(sizes: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], why_not: str | None) -> list[str]:
    """The figures in Markdown; `why_not`: why the Trainer has none."""
    cells = []
    for size, found in sizes.items():
        width, layers, count = SIZES[size]
        base = [each["seconds"] for each in found["loop"]]
        for way, runs in found.items():
            seconds = [each["seconds"] for each in runs]
            tokens = show(spread([count * TOKENS / each for each in seconds]), 0)
            over = "" if way == "loop" else percent(seconds, base)
            wait = show(spread([1e3 * each["data_wait_seconds"] for each in runs]), 2) if way[:5] == "telar" else ""
            step = show(spread([1e3 * each for each in seconds]), 1)
            cells.append([f"{size}: {width} x {layers}, {count} x {TOKENS}", way, step, tokens, over, wait])
    header = ("size", "way", "step, ms", "tokens/s", "over the bare loop", "waits for data, ms")
    telar = ("telar", "telar, no Ray")
    worst = max(
        apart(run["losses"], found["loop"][0]["losses"])
        for found in sizes.values()
        for way in telar
        for run in found.get(way, ())
    )
    said = [f"Losses of Telar's runs and of the bare loop differ by {worst:.1e} at most."]
    return [*rows(header, cells), "", *said, *([f"hf: not installed: {why_not}"] if why_not else [])]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train", description=__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-ray", action="store_true", help="leave out what needs Ray")
    parser.add_argument("--no-peers", action="store_true", help="leave out nanogpt and hf")
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/telar-bench"))
    parser.add_argument("--out", type=Path, default=Path("bench-train.json"))
    options = parser.parse_args()
    ways = [way for way in WAYS if not (options.no_ray and way == "telar")]
    interpreter, why_not = None, None
    if options.no_peers:
        ways = [way for way in ways if way not in ("nanogpt", "hf")]
    else:
        try:
            interpreter = ensure("trainer", options.envs.expanduser().resolve())
        except NotInstalled as error:
            why_not = str(error)
            ways.remove("hf")
    sizes: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for size in options.sizes.split(","):
        found = sizes[size] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as folder:
            bench = Bench(size, options.steps, Path(folder), interpreter)
            for repeat in range(options.repeats):
                turn = repeat % len(ways)
                # The first repeat begins with a run of Telar, which prepares the data.
                for way in ways[turn:] + ways[:turn]:
                    found[way].append(bench.measure(way, repeat))
                    print(f"#{repeat} {size} {way}: {found[way][-1]['seconds']:.4f} s", file=sys.stderr, flush=True)
    finish(options, {"sizes": sizes, "not_installed": why_not}, table(sizes, why_not))
    return 0


if __name__ == "__main__":
    sys.exit(main())
