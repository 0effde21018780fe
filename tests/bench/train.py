"""What Telar adds to a training step: `python -m tests.bench.train`; prints a table, writes one JSON.

One rank on one thread trains the smoke configuration's model, in turns: by `telar submit` on an embedded Ray cluster
(streamed data, controller, metrics, checkpoints on), by `python -m jobs.train_local` (the same without Ray; `--no-ray`
leaves the first out), and by a plain PyTorch loop (`torch.optim.Adam`, no DeepSpeed) over the same micro-batches, which
lie in memory. A step's seconds are the wall time from the end of step WARM to that of the last step, by their number.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from jobs.machine import hardware, versions
from tests.bench.figures import Spread, ratio, spread

ROOT = Path(__file__).parent.parent.parent
WARM = 10
# Name of a step's size: its overrides of configs/smoke.yaml. On one core of an EPYC some 100 and some 500 ms.
SIZES = {
    "small": ("train.global_batch_sequences=8", "train.micro_batch_sequences=8"),
    "large": ("train.global_batch_sequences=16", "train.micro_batch_sequences=16", "model.d_model=256"),
}


def overrides(size: str, steps: int, storage: str) -> list[str]:
    """`--set` options of a run without its name."""
    changes = (
        *SIZES[size],
        *(
            f"train.steps={steps}",
            f"checkpoint.every_steps={steps // 3}",
            "parallelism.data=1",
            f"run.storage={storage}",
        ),
    )
    return [word for change in changes for word in ("--set", change)]


def by_telar(size: str, steps: int, storage: str, name: str, ray: bool) -> float:
    """Seconds of a step, from the run's metrics.jsonl; the data are prepared by the first run."""
    options = [*overrides(size, steps, storage), "--set", f"run.name={name}"]
    if ray:
        # Evaluation and report are none of this; the data are there after the first run without Ray, too.
        submit = ("jobs.cli", "submit", "--embedded", "--wait", "--down")
        _run(*submit, "configs/smoke.yaml", *options, "--stage", "prepare")
        _run(*submit, "--resume", name, "--stage", "train")
    else:
        _run("jobs.train_local", "configs/smoke.yaml", *options)
    lines = Path(storage, name, "metrics.jsonl").read_text().splitlines()
    ends = [json.loads(line)["unix_seconds"] for line in lines]
    return (ends[-1] - ends[WARM - 1]) / (len(ends) - WARM)


def _run(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def by_loop(storage: str, name: str) -> float:
    """Seconds of a step of a plain loop over the micro-batches of the run `name`; a process of its own calls it."""
    import torch

    from cluster.storage import Storage
    from configs.load import load_config
    from data.loader import Loader
    from data.manifest import Manifest
    from data.shard_server import plain_opener
    from jobs.batches import to_model
    from jobs.references import references
    from model.batch import ModelBatch
    from model.schedule import learning_rate
    from model.transformer import build_model

    torch.set_num_threads(1)
    place, config = Storage(storage), load_config(Path(storage, name, "config.yaml"))
    manifest, train = Manifest.read(place, references(place.child(name))["data"]), config.train
    steps = []
    with closing(Loader(manifest, config, plain_opener(place, manifest), 0, 1)) as loader:
        for _ in range(train.steps):
            found = list(map(to_model, loader.next_step()))
            # The loader writes its arrays over.
            steps.append([_copy(ModelBatch, batch) for batch in found])
    model = build_model(config.model, manifest.vocabulary_size, config.run.seed, train.label_smoothing).train()
    own = config.optimizer
    optimizer = torch.optim.Adam(model.parameters(), betas=own.betas, eps=own.eps)
    ends = []
    for number, batches in enumerate(steps, 1):
        tokens = sum(float((batch.loss_weight > 0).sum()) for batch in batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(own, config.model.d_model, number, train.steps)
        for batch in batches:
            part = batch.trimmed()
            result = model(part.inputs, torch.tensor([number, batch.index]), part.labels, part.loss_weight)
            (result.loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), own.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.time())
    return (ends[-1] - ends[WARM - 1]) / (len(ends) - WARM)


def _copy(kind: Any, batch: Any) -> Any:
    inputs = tuple(tensor.clone() for tensor in batch.inputs)
    return kind(batch.index, inputs, batch.labels.clone(), batch.loss_weight.clone())


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train", description=__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true", help="leave out what needs Ray")
    parser.add_argument("--out", type=Path, default=Path("bench-train.json"))
    parser.add_argument("--loop", nargs=2, metavar=("STORAGE", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(by_loop(*options.loop))
        return 0
    ways = ("no Ray", "loop") if options.no_ray else ("Ray", "no Ray", "loop")
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**vars(options), "out": str(options.out)},
        "hardware": hardware(),
        "versions": versions(),
        "seconds": {},
    }
    print("| step | " + " | ".join(f"{way}, ms" for way in ways) + " | over the loop |\n|" + "---|" * (len(ways) + 2))
    for size in options.sizes.split(","):
        seconds = content["seconds"][size] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory(prefix="telar-bench-") as storage:
            for repeat in range(options.repeats):
                for way in ways:
                    name = f"{way.replace(' ', '-').lower()}-{repeat}"
                    if way == "loop":
                        took = float(_run("tests.bench.train", "--loop", storage, f"no-ray-{repeat}").split()[-1])
                    else:
                        took = by_telar(size, options.steps, storage, name, way == "Ray")
                    seconds[way].append(took)
        cells = [_milliseconds(spread(seconds[way])) for way in ways]
        over = [f"{way} {_percent(ratio(seconds[way], seconds['loop']))}" for way in ways[:-1]]
        print(f"| {size} | " + " | ".join(cells) + f" | {'; '.join(over)} |", flush=True)
    options.out.write_text(json.dumps(content, indent=1))
    return 0


def _milliseconds(found: Spread) -> str:
    return f"{1e3 * found.middle:,.1f} ({1e3 * found.low:,.1f} to {1e3 * found.high:,.1f})"


def _percent(found: Spread) -> str:
    return f"{100 * (found.middle - 1):+.1f}% ({100 * (found.low - 1):+.1f} to {100 * (found.high - 1):+.1f})"


if __name__ == "__main__":
    sys.exit(main())
