"""Tasks end to end: held-out records of corpora, a committed model with random weights, results.json."""

import csv
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import parse_config
from data.held_out import read_records
from data.prepare import prepare
from data.runners import serial
from data.tokenizer import Tokenizer
from jobs import evaluate as stage
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.fan_out import SerialRunner
from jobs.slices import read_rows
from jobs.tasks.base import Choices, LogLikelihood
from jobs.tasks.definitions import with_definitions
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


def with_tasks(trained, folder, **changes):
    """The run's configuration with tasks over files of its own, one for each request, and changes to one of them."""
    rows = [{"n": str(i), "text": f"review {i}", "label": str(i % 2), "side": "ab"[i % 2]} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "limit": 12}
    choice = {**common, "request": "choices", "source": "sentiment: {text}", "choices": ["negative", "positive"]}
    labelled = {**choice, "answer": "{label}", "metric": "accuracy"}
    written = {"request": "generate", "source": "qa: {text}", "target": "x", "metric": "squad"}
    definitions = [
        {**labelled, "name": "labelled", "group": "{side}", "gap": ["a", "b"], **changes},
        {**labelled, "name": "shifted", "source": "{text}!", "compare_with": "sentiment"},
        {**common, "name": "bits", "request": "loglikelihood", "target": "{text}", "metric": "bits_per_byte"},
        {**common, **written, "name": "written", "max_new_tokens": 3},
        {**choice, "name": "explained", "request": "explain", "metric": "faithfulness", "limit": 4},
        {**choice, "name": "reasons", "request": "explain", "metric": "plausibility", "rationale": "{n}", "limit": 4},
    ]
    tree = json.loads(trained.config.model_dump_json())
    tree["evaluate"]["definitions"] = definitions
    return with_definitions(parse_config(tree, "test"), None)


def nats_of_nothing_before(trained, text):
    """Nats of a text without a source: an encoder reads one eos, a decoder starts at bos."""
    tokenizer = Tokenizer.load(trained.storage.read_bytes(trained.manifest.tokenizer_path))
    labels = [*tokenizer.encode(text), tokenizer.eos_id]
    inputs = []
    for tokens in ([tokenizer.eos_id] * (trained.config.data.layout == "pairs"), [tokenizer.bos_id, *labels[:-1]]):
        row = torch.tensor([tokens], dtype=torch.int64)
        inputs += [row, torch.arange(row.shape[1])[None], torch.ones_like(row)]
    with torch.no_grad():
        found = trained.model.logits(tuple(inputs))[0].double().log_softmax(-1)
    return -sum(float(found[i, label]) for i, label in enumerate(labels))


def test_tasks_as_data_are_further_cells(trained, tmp_path):
    config = with_tasks(trained, tmp_path)
    results = evaluated(trained, config)
    cells = {(c["corpus"], c["task"]): c for c in results["cells"]}
    named = [("labelled", "accuracy"), ("shifted", "accuracy"), ("bits", "bits_per_byte"), ("written", "squad")]
    assert [cells[each]["records"] for each in named] == [12] * 4
    found = [m["name"] for m in cells["labelled", "accuracy"]["metrics"]]
    assert found == ["accuracy", "macro_f1", "calibration_error", "accuracy:a", "accuracy:b", "gap"]
    rows = kept_rows(trained, "bits", "bits_per_byte", config)
    for row in rows:
        text = f"review {row.index}"
        assert sum(row.answers[0]["nll"]) == pytest.approx(nats_of_nothing_before(trained, text), rel=1e-5)
        assert row.answers[0]["bytes"] == len(text)
    lost = metric(results, "shifted", "accuracy", "drop")
    here, there = (
        metric(results, "shifted", "accuracy", "accuracy"),
        metric(results, "sentiment", "sentiment", "accuracy"),
    )
    assert (
        lost["value"] == pytest.approx(there["value"] - here["value"]) and lost["low"] <= lost["value"] <= lost["high"]
    )
    assert max(row.answers[0]["tokens"] for row in kept_rows(trained, "written", "squad", config)) <= 3
    assert [m["name"] for m in cells["explained", "faithfulness"]["metrics"]] == ["comprehensiveness", "sufficiency"]
    for row in kept_rows(trained, "explained", "faithfulness", config):
        answer = row.answers[0]
        assert "".join(answer["pieces"]) == f"sentiment: review {row.index}"
        assert len(answer["attribution"]) == len(answer["pieces"]) and 0.5 <= answer["probability"] <= 1.0
        assert len(answer["rollout"]) == len(answer["pieces"]) and sum(answer["rollout"]) == pytest.approx(1.0)
    reasons = {m["name"]: m for m in cells["reasons", "plausibility"]["metrics"]}
    assert list(reasons) == ["gradients_precision", "gradients_mass", "rollout_precision", "rollout_mass"]
    chance = reasons["rollout_mass"]["baselines"][0]
    assert chance["name"] == "random order" and 0.0 < chance["value"] < 0.5
    shown = [each for each in results["explanations"] if each["corpus"] == "reasons"]
    assert len(shown) == 2 and all(each["choice"] in ("negative", "positive") and each["maps"] for each in shown)
    assert stage.is_done(config, trained.storage, RUN, trained.manifest, STEP)


def test_a_reason_that_does_not_stand_in_the_source_is_a_problem_of_its_task(trained, tmp_path):
    changes = {"name": "strange", "request": "explain", "metric": "plausibility", "rationale": "nowhere {n}"}
    config = with_tasks(trained, tmp_path, **changes, answer="", group="", gap=None)
    cells = {cell.corpus: cell for cell in stage.plan(config, trained.storage, trained.manifest, "")}
    (problem,) = cells["strange"].problems
    assert problem.startswith("task strange: rationale: row ") and problem.count("does not stand in the source")


def test_two_definitions_never_share_a_row(trained, tmp_path):
    def keys(config):
        digest = stage.digest_of([commit.latest(trained.storage.child(RUN, "checkpoints"))[0]])
        cells = stage.plan(config, trained.storage, trained.manifest, digest)
        return {cell.corpus: {piece.key for piece in cell.slices} for cell in cells if cell.task.name == "accuracy"}

    first = keys(with_tasks(trained, tmp_path))
    assert first == keys(with_tasks(trained, tmp_path)), "the same definition finds its slices again"
    # Not one request differs, and still it is another task.
    second = keys(with_tasks(trained, tmp_path, normalise="byte"))
    assert first["labelled"] & second["labelled"] == set() and first["shifted"] == second["shifted"]
    rows = (tmp_path / "rows.jsonl").read_text()
    config = with_tasks(trained, tmp_path)
    (tmp_path / "rows.jsonl").write_text(rows.replace('"n": "7"', '"n": "77"'))
    assert keys(config)["labelled"] & first["labelled"] == set(), "other data, though no request names the field"


def test_done_means_the_same_files(trained, tmp_path):
    config = with_tasks(trained, tmp_path)
    evaluated(trained, config)
    assert stage.is_done(config, trained.storage, RUN, trained.manifest, STEP)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "\n")
    assert not stage.is_done(config, trained.storage, RUN, trained.manifest, STEP)
    (tmp_path / "rows.jsonl").unlink()
    assert not stage.is_done(config, trained.storage, RUN, trained.manifest, STEP)


def test_a_task_whose_rows_are_gone_is_a_missing_cell(trained, tmp_path):
    config = with_tasks(trained, tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(stage.EvaluationError, match="6 of 12 cells have no result") as caught:
        evaluated(trained, config)
    assert "accuracy of labelled" in str(caught.value) and "does not exist" in str(caught.value)
    kept = json.loads(trained.storage.read_text(f"{RUN}/evaluation/incomplete.json"))
    assert {c["corpus"] for c in kept["cells"] if c["status"] == "ok"} >= {"sentiment", "qa"}


def test_a_drop_needs_the_same_figure_on_both_sides(trained, tmp_path):
    config = with_tasks(trained, tmp_path, compare_with="qa", group="", gap=None)
    with pytest.raises(ConfigError, match=r"task labelled: compare_with: no 'qa' with accuracy; there are .*sentiment"):
        evaluated(trained, config)
