"""Tasks end to end: held-out records of corpora, a committed model with random weights, results.json."""

import csv
import json
from functools import partial
from types import SimpleNamespace

import pytest

from cluster import commit
from cluster.storage import Storage
from configs.load import parse_config
from data.held_out import read_records
from data.prepare import prepare
from data.runners import serial
from jobs import evaluate as stage
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.fan_out import SerialRunner
from jobs.slices import read_rows
from jobs.tasks.base import Choices, LogLikelihood
from model.checkpoint import write_snapshot
from model.fragments import WEIGHT, Fragment
from model.transformer import build_model
from tests.test_evaluate import literal_nll, metric

RUN = "demo"
STEP = 6


def write_corpora(folder):
    """Three CSV files of 60 rows, their contents alike for each run."""
    rows = [("it was good", "positive"), ("it was bad", "negative"), ("so very good", "positive")]
    tables = {
        "sentiment": [(f"review {i}: {rows[i % 3][0]}", rows[i % 3][1]) for i in range(60)],
        "qa": [(f"Mary went to room {i}. Where is Mary?", f"the room {i}") for i in range(60)],
        "text_generation": [(f"Once {i}", f"there were {i} cats and {i} dogs") for i in range(60)],
    }
    corpora = []
    for name, table in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "answer"), *table])
        path = str(folder / f"{name}.csv")
        template = {"source": f"{name}: {{text}}", "target": "{answer}"}
        corpora.append({"name": name, "kind": "csv", "path": path, **template, "task": name})
    return corpora


def commit_random_model(folder, layout, evaluate):
    """A run's prepared data and, as the checkpoint of step 6, a model that was never trained."""
    tree = {
        "run": {"storage": str(folder / "runs"), "seed": 3},
        "data": {
            "corpora": write_corpora(folder),
            "tokenizer": {"vocabulary_size": 320},
            "layout": layout,
            "source_tokens": 48,
            "target_tokens": 48,
            "held_out_fraction": 0.3,
        },
        "model": {
            "architecture": "encoder_decoder" if layout == "pairs" else "decoder",
            "d_model": 16,
            "heads": 2,
            "d_ff": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "tie_embeddings": False,
        },
        "train": {"steps": STEP, "global_batch_sequences": 4, "micro_batch_sequences": 2},
        "evaluate": {"slice_records": 5, "bootstrap_rounds": 100, "max_new_tokens": 6, **evaluate},
    }
    config = parse_config(tree, "test")
    storage = Storage(config.run.storage)
    manifest = prepare(config, storage, serial, lambda line: None)
    model = build_model(config.model, manifest.vocabulary_size, seed=9).eval()
    checkpoints = storage.child(RUN, "checkpoints")
    pieces = [
        Fragment(name, WEIGHT, tuple(parameter.shape), 0, parameter.detach().flatten())
        for name, parameter in model.named_parameters()
    ]
    belongs = {"data_digest": manifest.digest, "tokenizer_digest": manifest.tokenizer_digest}
    commit.commit(checkpoints, STEP, 1, [write_snapshot(checkpoints, STEP, 1, 0, pieces)], 1, belongs)
    return SimpleNamespace(config=config, storage=storage, manifest=manifest, model=model)


def evaluated(trained, config=None):
    """Results of a run in this process."""
    config = config or trained.config
    runner = SerialRunner(partial(load_evaluator, EvaluatorTask(config, trained.storage.url, RUN, STEP)))
    arguments = (config, trained.storage, RUN, trained.manifest, STEP)
    return stage.evaluate(*arguments, lambda line: None, lambda: False, runner=runner)


def kept_rows(trained, corpus, task, config=None):
    """The rows of one cell, read back from its slices."""
    digest = stage.digest_of([commit.latest(trained.storage.child(RUN, "checkpoints"))[0]])
    cells = stage.plan(config or trained.config, trained.storage, trained.manifest, digest)
    cell = next(c for c in cells if (c.corpus, c.task.name) == (corpus, task))
    return [row for piece in cell.slices for row in read_rows(trained.storage.child(RUN), piece)]


@pytest.fixture(scope="module", params=["pairs", "sequence"])
def trained(request, tmp_path_factory):
    return commit_random_model(tmp_path_factory.mktemp("tasks"), request.param, {})


def test_corpora_are_judged_by_their_tasks(trained):
    results = evaluated(trained)
    assert {(c["corpus"], c["task"]) for c in results["cells"] if c["status"] == "ok"} >= {
        ("sentiment", "sentiment"),
        ("qa", "qa"),
        ("text_generation", "text_generation"),
    }
    records = read_records(trained.storage, trained.manifest, "sentiment", 256, trained.config.run.seed)
    nats = [[sum(literal_nll(trained, r.source, label)) for label in ("negative", "positive")] for r in records]
    right = [(pair[1] < pair[0]) == (r.target == "positive") for pair, r in zip(nats, records, strict=True)]
    rows = kept_rows(trained, "sentiment", "sentiment")
    for row, pair in zip(rows, nats, strict=True):
        assert row.answers[0]["nll"] == pytest.approx(pair, rel=1e-5)
    found = metric(results, "sentiment", "sentiment", "accuracy")
    assert found["n"] == len(records) > 5 and found["value"] == pytest.approx(sum(right) / len(right))
    majority = {base["name"]: base["value"] for base in found["baselines"]}["most frequent label"]
    assert majority == pytest.approx(sum(r.target == "positive" for r in records) / len(records))
    answers = metric(results, "qa", "qa", "exact_match")
    assert answers["value"] == 0.0 and answers["baselines"][0]["name"] == "most frequent answer"
    json.dumps(results, allow_nan=False)


def test_candidates_are_answered_as_if_asked_one_by_one(trained):
    task = EvaluatorTask(trained.config, trained.storage.url, RUN, STEP)
    model = load_evaluator(task)._model
    source, targets = "sentiment: review 4", ("positive", "no", "a much longer candidate than these")
    single = [model.answer("sentiment", [LogLikelihood(source, target)], 4)[0] for target in targets]
    mixed = [LogLikelihood("sentiment: x", "y"), Choices(source, targets), LogLikelihood("sentiment: z", "w")]
    found = model.answer("sentiment", mixed, 4)
    assert found[1]["nll"] == pytest.approx([sum(each["nll"]) for each in single], rel=1e-5)
    assert found[1]["tokens"] == [len(each["labels"]) for each in single]
    assert found[1]["bytes"] == [len(target) for target in targets]
    assert found[0]["nll"] == pytest.approx(model.answer("sentiment", mixed[:1], 4)[0]["nll"], rel=1e-5)
