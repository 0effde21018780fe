"""The evaluate stage with a made-up model: slices, resume, errors, retry, results that are complete or absent."""

import json
import math
import os
import re
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster import commit
from cluster.storage import Storage
from configs.errors import RunStopped, TelarError
from configs.load import parse_config
from data.held_out import HeldOut, read_records
from data.loader import Loader
from data.packing import cut_pairs, cut_sequence
from data.prepare import prepare
from data.runners import serial
from data.shard_server import plain_opener
from data.tokenizer import Tokenizer
from jobs import evaluate as stage
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.evaluator import Evaluator
from jobs.fan_out import RayRunner, SerialRunner
from jobs.ngrams import count
from jobs.slices import cut, read_rows
from jobs.tasks.base import Example, Generate, LogLikelihood, TrainingFacts
from jobs.training_facts import training_facts
from model.checkpoint import write_snapshot
from model.fragments import WEIGHT, Fragment
from model.transformer import build_model
from tests.test_slices import pieces

STEP = 20
RUN = "demo"
MANIFEST = SimpleNamespace(digest="data0", tokenizer_digest="tok0", folder="data/data0")
FACTS = TrainingFacts(count([np.array([2, 3, 4, 0])] * 5, 8, 1), {"summary": ["Return the value.", "Close it."]})


class FakeModel:
    """Answers from the text alone; sources that hold `poison` cannot be answered."""

    def __init__(self, poison=None, shift=0.0):
        self.poison, self.shift, self.batches = poison, shift, []

    def answer(self, corpus, requests, max_new_tokens):
        self.batches.append([request.source for request in requests])
        if self.poison and any(self.poison in request.source for request in requests):
            raise ValueError(f"cannot answer {self.poison}")
        return [self.one(request) for request in requests]

    def one(self, request):
        if isinstance(request, Generate):
            return {
                "text": "    return 1\n" if "complete" in request.source else "Return it.",
                "tokens": 4,
                "ended": True,
            }
        fits = request.source.split()[-1] == request.target.split()[-1].rstrip(".")
        return {
            "labels": [2, 3, 0],
            "nll": [self.shift + (1.0 if fits else 2.0)] * 3,
            "correct": [1, 0, 1],
            "pieces": [3],
            "bytes": 9,
        }


def make_config(**evaluate):
    corpora = [
        {"name": "prose", "kind": "text", "path": "x", "target": "{text}"},
        {"name": "summary", "kind": "python", "path": "x", "target": "{summary}", "task": "summary"},
        {"name": "completion", "kind": "python", "path": "x", "target": "{body}", "task": "completion"},
    ]
    return parse_config(
        {
            "data": {"corpora": corpora},
            "train": {"steps": STEP, "global_batch_sequences": 1, "micro_batch_sequences": 1},
            "evaluate": {"slice_records": 4, "bootstrap_rounds": 100, "samples": 5, **evaluate},
        },
        "test",
    )


def held_out(storage, manifest, corpus, limit, seed):
    fields = {"name": "get", "signature": "def get(x):", "body": "    return x\n"}
    prefix = "complete: " if corpus == "completion" else ""
    return [HeldOut(i, f"{prefix}{corpus} {i}", f"Return {i}.", fields) for i in range(min(limit, 10))]


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "read_records", held_out)
    storage = Storage(str(tmp_path))
    commit_step(storage, STEP, b"weights")
    return storage


def commit_step(storage, step, content):
    checkpoints = storage.child(RUN, "checkpoints")
    checkpoints.write_bytes(f"{commit.attempt_folder(step, 1)}/rank-00000.safetensors", content)
    file = commit.RankFile(0, "rank-00000.safetensors", len(content), content.hex())
    commit.commit(checkpoints, step, 1, [file], 1, {})


def run(storage, model, config=None, step=STEP, should_stop=lambda: False, report=None):
    runner = SerialRunner(lambda: Evaluator(model, storage.child(RUN)))
    say = report.append if report is not None else (lambda line: None)
    return stage.evaluate(
        config or make_config(), storage, RUN, MANIFEST, step, say, should_stop, runner=runner, facts=lambda: FACTS
    )


def cell(results, corpus, task):
    return next(c for c in results["cells"] if (c["corpus"], c["task"]) == (corpus, task))


def metric(results, corpus, task, name):
    return next(m for m in cell(results, corpus, task)["metrics"] if m["name"] == name)


def test_results_hold_every_cell_and_are_written(storage):
    lines = []
    results = run(storage, FakeModel(), report=lines)
    assert json.loads(storage.read_text(f"{RUN}/evaluation/results.json")) == results
    cells = [(c["corpus"], c["task"], c["status"]) for c in results["cells"]]
    assert cells == [
        ("all corpora", "likelihood", "ok"),
        ("prose", "likelihood", "ok"),
        ("summary", "likelihood", "ok"),
        ("summary", "summary", "ok"),
        ("completion", "likelihood", "ok"),
        ("completion", "completion", "ok"),
    ]
    overall, prose = metric(results, "all corpora", "likelihood", "nll"), metric(results, "prose", "likelihood", "nll")
    assert (overall["value"], overall["n"], overall["tokens"]) == (1.0, 30, 90)
    assert prose["n"] == 10 and prose["low"] <= prose["value"] <= prose["high"]
    used = metric(results, "summary", "summary", "reference_nll")
    assert used["value"] == 1.0 and used["baselines"][0]["value"] == 2.0
    assert used["baselines"][0]["difference_high"] < 0
    assert metric(results, "completion", "completion", "compiles")["value"] == 1.0
    assert results["training_tokens_counted"] == 20
    assert len(results["samples"]) == 5
    assert {sample["corpus"] for sample in results["samples"]} == {"prose", "summary", "completion"}
    assert any("compiles" in line and "1.000" in line for line in lines)
    assert len(storage.names(f"{RUN}/evaluation/slices")) == results["slices"] == 15


def test_done_means_same_inputs(storage):
    config = make_config()
    assert not stage.is_done(config, storage, RUN, MANIFEST, STEP)
    run(storage, FakeModel())
    assert stage.is_done(config, storage, RUN, MANIFEST, STEP)
    assert stage.is_done(make_config(workers=7), storage, RUN, MANIFEST, STEP), "evaluators are no input"
    assert not stage.is_done(make_config(max_new_tokens=9), storage, RUN, MANIFEST, STEP)
    other = SimpleNamespace(**{**vars(MANIFEST), "digest": "data1"})
    assert not stage.is_done(config, storage, RUN, other, STEP)
    commit_step(storage, STEP + 1, b"other weights")
    assert not stage.is_done(config, storage, RUN, MANIFEST, STEP + 1)


def test_a_stopped_evaluation_goes_on_where_it_was(storage):
    first = FakeModel()
    with pytest.raises(RunStopped):
        run(storage, first, should_stop=lambda: len(first.batches) == 6)
    assert not storage.exists(f"{RUN}/evaluation/results.json")
    second = FakeModel()
    resumed = run(storage, second, make_config(workers=1))
    assert len(second.batches) == 9 and resumed["slices_reused"] == 6
    storage.remove(f"{RUN}/evaluation")
    fresh = run(storage, FakeModel())
    assert fresh["cells"] == resumed["cells"] and fresh["samples"] == resumed["samples"]
    again = FakeModel()
    run(storage, again)
    assert again.batches == []


def test_two_checkpoints_never_share_a_row(storage):
    commit_step(storage, STEP + 1, b"other weights")
    old = run(storage, FakeModel())
    model = FakeModel(shift=1.0)
    new = run(storage, model, step=STEP + 1)
    assert len(model.batches) == new["slices"] and new["slices_reused"] == 0
    assert metric(new, "prose", "likelihood", "nll")["value"] == metric(old, "prose", "likelihood", "nll")["value"] + 1


def test_longest_slices_go_first(storage):
    order = []

    class Records(SerialRunner):
        def run(self, slices, on_done, should_stop):
            order.extend(slices)
            return super().run(slices, on_done, should_stop)

    runner = Records(lambda: Evaluator(FakeModel(), storage.child(RUN)))
    arguments = (make_config(), storage, RUN, MANIFEST, STEP, print, lambda: False)
    stage.evaluate(*arguments, runner=runner, facts=lambda: FACTS)
    costs = [piece.cost for piece in order]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert order[-1].task == "likelihood" and order[0].task != "likelihood"


def test_a_record_that_fails_is_a_record(storage):
    config = make_config(slice_records=32, likelihood_records=10)
    many_records = [HeldOut(i, f"prose {i}", f"Return {i}.", {}) for i in range(30)]

    def longer(*arguments):
        return many_records if arguments[2] == "prose" else held_out(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_records", longer)
        results = run(storage, FakeModel(poison="prose 29"), config)
    found = cell(results, "prose", "likelihood")
    assert (found["status"], found["failed_records"], found["records"]) == ("ok", 1, 30)
    assert metric(results, "prose", "likelihood", "nll")["n"] == 29


def test_rows_with_errors_are_asked_again(storage):
    with pytest.raises(stage.EvaluationError):
        run(storage, FakeModel(poison="prose 3"))
    model = FakeModel()
    again = run(storage, model)
    # The slice of that record, as one batch; all others are kept.
    assert [sorted(set(batch)) for batch in model.batches] == [[f"prose {i}" for i in range(4)]]
    assert again["slices_reused"] == again["slices"] - 1
    storage.remove(f"{RUN}/evaluation")
    assert run(storage, FakeModel())["cells"] == again["cells"]


def test_too_many_failed_records_fail_the_cell_and_nothing_is_averaged(storage):
    with pytest.raises(stage.EvaluationError, match=r"likelihood of prose: 1 of 10 records failed.*cannot answer"):
        run(storage, FakeModel(poison="prose 3"))
    assert not storage.exists(f"{RUN}/evaluation/results.json")
    incomplete = json.loads(storage.read_text(f"{RUN}/evaluation/incomplete.json"))
    assert cell(incomplete, "prose", "likelihood")["metrics"] == []
    assert "all corpora" not in [c["corpus"] for c in incomplete["cells"]]
    assert cell(incomplete, "summary", "summary")["status"] == "ok"
    assert not stage.is_done(make_config(), storage, RUN, MANIFEST, STEP)


def test_missing_slices_are_listed(storage):
    class GivesUp:
        def run(self, slices, on_done, should_stop):
            worker = Evaluator(FakeModel(), storage.child(RUN))
            kept = [piece for piece in slices if piece.task != "completion"]
            for piece in kept:
                worker.work(piece)
            return {piece.key: "given up after 3 tries" for piece in slices if piece not in kept}

    with pytest.raises(stage.EvaluationError, match="completion of completion: given up after 3 tries"):
        stage.evaluate(
            make_config(), storage, RUN, MANIFEST, STEP, print, lambda: False, runner=GivesUp(), facts=lambda: FACTS
        )
    incomplete = json.loads(storage.read_text(f"{RUN}/evaluation/incomplete.json"))
    assert cell(incomplete, "completion", "completion")["status"] == "missing"
    results = run(storage, FakeModel())
    assert results["slices_reused"] == 12 and not storage.exists(f"{RUN}/evaluation/incomplete.json")


def test_a_corpus_without_held_out_records_is_empty_not_averaged(storage, monkeypatch):
    def none_of_prose(*arguments):
        return [] if arguments[2] == "prose" else held_out(*arguments)

    monkeypatch.setattr(stage, "read_records", none_of_prose)
    results = run(storage, FakeModel())
    assert cell(results, "prose", "likelihood")["status"] == "empty"
    assert "all corpora" not in [c["corpus"] for c in results["cells"]]


def test_batches_come_from_the_slice_alone(tmp_path):
    examples = [Example(HeldOut(i, f"s{i}", "t", {}), (LogLikelihood(f"s{i}", "t"),)) for i in range(4)]
    model, (piece,) = FakeModel(poison="s2"), cut("c", "likelihood", 1, examples, 4, 8, {})
    rows = Evaluator(model, Storage(str(tmp_path))).rows(piece)
    assert [row.error is None for row in rows] == [True, True, False, True]
    assert rows[2].error == "ValueError: cannot answer s2"
    assert model.batches == [["s0", "s1", "s2", "s3"], ["s0"], ["s1"], ["s2"], ["s3"]]


@pytest.fixture(scope="module", params=["pairs", "sequence"])
def trained(request, tmp_path_factory):
    """Real data, tokenizer and model with random weights, committed as the checkpoint of step 6."""
    folder = tmp_path_factory.mktemp("trained")
    for number in range(12):
        functions = [
            f'def read_{number}_{i}(path):\n    """Return line {i} of file {number} as text."""\n'
            f"    lines = open(path).readlines()\n    print(path, {number})\n    return lines[{i}]\n"
            for i in range(6)
        ]
        (folder / f"module_{number}.py").write_text("\n\n".join(functions))
    kinds = {
        "summary": ("summarize: {signature}\n{body}", "{summary}"),
        "completion": ("complete: {context}{signature}", "{body}"),
    }
    corpora = [
        {"name": name, "kind": "python", "path": str(folder), "source": source, "target": target, "task": name}
        for name, (source, target) in kinds.items()
    ]
    tree = {
        "run": {"storage": str(folder / "runs"), "seed": 3},
        "data": {
            "corpora": corpora,
            "tokenizer": {"vocabulary_size": 320},
            "layout": request.param,
            "source_tokens": 48,
            "target_tokens": 20 if request.param == "pairs" else 24,
            "held_out_fraction": 0.4,
        },
        "model": {
            "architecture": "encoder_decoder" if request.param == "pairs" else "decoder",
            "d_model": 16,
            "heads": 2,
            "d_ff": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "tie_embeddings": False,
        },
        "train": {"steps": 6, "global_batch_sequences": 4, "micro_batch_sequences": 2},
        "evaluate": {"slice_records": 5, "bootstrap_rounds": 100, "max_new_tokens": 6, "samples": 2},
    }
    config = parse_config(tree, "test")
    storage = Storage(config.run.storage)
    manifest = prepare(config, storage, serial, lambda line: None)
    checkpoints = storage.child(RUN, "checkpoints")
    belongs = {"data_digest": manifest.digest, "tokenizer_digest": manifest.tokenizer_digest}
    models = {step: build_model(config.model, manifest.vocabulary_size, seed=3 + step).eval() for step in (4, 6)}
    for step, model in models.items():
        pieces = [
            Fragment(name, WEIGHT, tuple(parameter.shape), 0, parameter.detach().flatten())
            for name, parameter in model.named_parameters()
        ]
        commit.commit(checkpoints, step, 1, [write_snapshot(checkpoints, step, 1, 0, pieces)], 1, belongs)
    return SimpleNamespace(config=config, storage=storage, manifest=manifest, model=models[6], earlier=models[4])


def literal_nll(trained, source, target):
    """Nats of each label, one padding-free row at a time, straight from the logits."""
    manifest, data = trained.manifest, trained.config.data
    tokenizer = Tokenizer.load(trained.storage.read_bytes(manifest.tokenizer_path))
    source_ids, target_ids = (np.array(tokenizer.encode(text), dtype=np.int32) for text in (source, target))
    nats = []
    if data.layout == "pairs":
        pieces = cut_pairs(source_ids, target_ids, tokenizer.eos_id, data.source_tokens, data.target_tokens)
    else:
        pieces = cut_sequence(source_ids, target_ids, tokenizer.eos_id, data.target_tokens)
    for ids, labels in pieces:
        inputs, written = [], np.concatenate([[tokenizer.bos_id], labels[:-1]])
        first = 0
        if data.layout == "sequence":
            written, first = np.concatenate([[tokenizer.bos_id], ids, labels[:-1]]), len(ids)
            ids = ids[:0]
        for tokens in (ids, written):
            row = torch.tensor(tokens[None], dtype=torch.int64)
            inputs += [row, torch.arange(row.shape[1])[None], torch.ones_like(row)]
        with torch.no_grad():
            probabilities = trained.model.logits(tuple(inputs))[0, first:].double().softmax(-1)
        nats += [-math.log(probabilities[i, label]) for i, label in enumerate(labels)]
    return nats


def test_a_checkpoint_is_evaluated_end_to_end(trained):
    config, storage, manifest = trained.config, trained.storage, trained.manifest
    task = EvaluatorTask(config, storage.url, RUN, 6)
    runner = SerialRunner(partial(load_evaluator, task))
    results = stage.evaluate(config, storage, RUN, manifest, 6, print, lambda: False, runner=runner)
    records = read_records(storage, manifest, "completion", 256, config.run.seed)
    nats = [literal_nll(trained, record.source, record.target) for record in records]
    # In layout sequence the sources, which are longer, leave 12 of the 24 positions to labels.
    assert max(map(len, nats)) > 20, "some targets are cut in pieces"
    found = metric(results, "completion", "likelihood", "nll")
    assert found["tokens"] == sum(map(len, nats)) and found["n"] == len(records) > 4
    assert found["value"] == pytest.approx(sum(map(sum, nats)) / sum(map(len, nats)), rel=1e-5)
    size = sum(len(record.target.encode()) for record in records)
    bits = metric(results, "completion", "likelihood", "bits_per_byte")
    assert bits["value"] == pytest.approx(sum(map(sum, nats)) / math.log(2) / size, rel=1e-5)
    share = metric(results, "completion", "completion", "compiles")
    assert {base["name"]: base["value"] for base in share["baselines"]} == {"always pass": 1.0, "reference": 1.0}
    loader = Loader(manifest, config, plain_opener(storage, manifest), 0, 1, 0)
    try:
        trained_on = sum(float(batch.loss_weight.sum()) for _ in range(6) for batch in loader.next_step())
    finally:
        loader.close()
    assert results["training_tokens_counted"] == trained_on, "n-grams count the very tokens that were trained on"
    assert {sample["corpus"] for sample in results["samples"]} == {"summary", "completion"}


def test_facts_hold_the_targets_of_summaries(trained):
    facts = training_facts(trained.config, trained.storage, trained.manifest, 6)
    assert set(facts.targets) == {"summary"}
    assert len(facts.targets["summary"]) > 4
    assert all(re.fullmatch(r"Return line \d of file \d+ as text\.", text) for text in facts.targets["summary"])


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    storage = Storage(str(tmp_path))
    for path in Path(trained.storage.local_path()).rglob("*"):
        if path.is_file():
            relative = path.relative_to(trained.storage.local_path()).as_posix()
            content = path.read_bytes()
            storage.write_bytes(relative, content[:-1] + b"x" if path.suffix == ".safetensors" else content)
    task = EvaluatorTask(trained.config, storage.url, RUN, 6)
    with pytest.raises(commit.CheckpointError, match=r"rank-00000\.safetensors"):
        load_evaluator(task)


class Deadly(Evaluator):
    """Kills its own process on the slice that starts with s0, as long as `marks` holds fewer than `deaths` files."""

    def __init__(self, url, deaths):
        self.storage, self.deaths = Storage(url), deaths
        super().__init__(FakeModel(), self.storage)

    def work(self, piece):
        if piece.examples[0].record.index == 0 and len(self.storage.names("marks")) < self.deaths:
            self.storage.write_text(f"marks/{os.getpid()}", "x")
            os.kill(os.getpid(), signal.SIGKILL)
        super().work(piece)


class DiesLast(Deadly):
    """Its fatal slice outlasts all others."""

    def work(self, piece):
        if piece.examples[0].record.index == 0 and not self.storage.names("marks"):
            others = [read_rows(self.storage, each) is None for each in pieces()[1:]]
            while any(others):
                time.sleep(0.05)
                others = [read_rows(self.storage, each) is None for each in pieces()[1:]]
        super().work(piece)


def cannot_load():
    raise TelarError("the checkpoint is damaged")


@pytest.mark.ray
def test_an_evaluator_that_dies_is_replaced_and_its_slice_done_again(ray_cluster, tmp_path):
    for deaths, given_up in ((1, 0), (3, 1)):
        url = str(tmp_path / str(deaths))
        work, done = pieces(), []
        failures = RayRunner(partial(Deadly, url, deaths), 2, f"run{deaths}", 60).run(work, done.append, lambda: False)
        assert len(failures) == given_up
        assert len(done) == 3 - given_up
        rows = [read_rows(Storage(url), piece) for piece in work]
        assert [found is None for found in rows] == [bool(given_up), False, False]
    # Who has nothing left to do takes over: with a lost node there may be no CPU for another evaluator.
    url = str(tmp_path / "last")
    runner, done = RayRunner(partial(DiesLast, url, 1), 2, "last", 60), []
    assert runner.run(pieces(), done.append, lambda: False) == {} and len(done) == 3
    assert Storage(url).names("marks") and runner._spawned == 2
    with pytest.raises(TelarError, match="the checkpoint is damaged"):
        RayRunner(cannot_load, 2, "damaged", 60).run(pieces(), print, lambda: False)
    with pytest.raises(RunStopped):
        RayRunner(partial(Deadly, url, 0), 1, "stopped", 60).run(pieces(), print, lambda: True)


@pytest.fixture
def ray_cluster():
    import ray

    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="telar-test-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            namespace="telar",
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
