"""configs/seven_tasks.yaml the whole way in a tiny size: prepared, trained without Ray, evaluated on all seven."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cluster.storage import Storage
from configs.load import load_config
from data.manifest import Manifest
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.evaluate import evaluate
from jobs.fan_out import SerialRunner
from jobs.references import references
from jobs.tasks.base import Attempts
from jobs.tasks.definitions import read_definition

ROOT = Path(__file__).parent.parent
DATASETS = ROOT.parent / "shared" / "datasets"
TINY = (
    *("run.name=tiny", "images.steps=5", "images.width=8", "model.d_model=32", "model.d_ff=32"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.heads=2", "train.steps=3"),
    *("train.global_batch_sequences=16", "evaluate.generate_records=3", "evaluate.likelihood_records=4"),
    *("evaluate.max_new_tokens=8", "evaluate.bootstrap_rounds=100", "evaluate.allow_code_execution=true"),
)


@pytest.mark.slow
def test_one_model_learns_all_seven_and_is_judged_on_each(tmp_path):
    if not DATASETS.is_dir():
        pytest.skip(f"{DATASETS} is not on this machine")
    changes = [*TINY, f"run.storage={tmp_path}", f"data.datasets={DATASETS}"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train_local", "configs/seven_tasks.yaml", *(f"--set={each}" for each in changes)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(tmp_path / "tiny" / "config.yaml")
    problems = read_definition("humaneval", None, str(DATASETS))
    problems = problems.model_copy(update={"attempts": 2, "pass_at": (1, 2), "limit": 2})
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"definitions": (problems,)})})
    storage = Storage(str(tmp_path))
    load = partial(load_evaluator, EvaluatorTask(config, storage.url, "tiny", 3))
    manifest = Manifest.read(storage, references(storage.child("tiny"))["data"])
    found = evaluate(config, storage, "tiny", manifest, 3, print, lambda: False, SerialRunner(load))
    own = {(cell["corpus"], cell["task"]) for cell in found["cells"] if cell["task"] != "likelihood"}
    named = {(corpus.name, corpus.task) for corpus in config.data.corpora}
    assert own == {*named, ("humaneval", "pass_at_k")} and len(named) == 7
    metrics = {(c["corpus"], m["name"]): m for c in found["cells"] for m in c["metrics"]}
    assert metrics["humaneval", "pass_at_2"]["baselines"][0]["value"] == 1.0
    assert 0.0 <= metrics["shapes", "attributes"]["value"] <= 1.0 and ("multi30k", "chrf_pp") in metrics
    model = load()._model
    asked = [Attempts(f"complete: def f{i}(", 3, 1.0, i) for i in range(2)]
    together = model.answer("humaneval", asked, 6)
    assert together[1:] == model.answer("humaneval", asked[1:], 6), "a draw depends on its request alone"
    assert len(set(together[0]["texts"])) == 3, "a model that knows nothing draws different texts"
