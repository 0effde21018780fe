"""lm-evaluation-harness as a back-end: refusals, conversion of recorded results; with it installed, real tasks."""

import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import parse_config, to_yaml
from data.prepare import prepare
from data.runners import serial
from data.tokenizer import read_tokenizer
from jobs import evaluate as stage
from jobs import harness, harness_tasks
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.commands.task_listing import evaluate_overrides
from jobs.fan_out import SerialRunner
from jobs.harness_results import cells_of, missing_cell, rows_digest
from jobs.ngrams import count
from jobs.results import inputs_digest, table_lines
from jobs.tasks.base import TrainingFacts
from jobs.verbs.running import evaluate
from model.checkpoint import write_snapshot
from model.fragments import WEIGHT, Fragment
from model.transformer import build_model

INSTALLED = all(importlib.util.find_spec(name) for name in harness_tasks.PACKAGES)
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed (pip install 'telar[lm-eval]')")
LLAMA = {
    "architecture": "decoder",
    "positions": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "feed_forward": "swiglu",
    "bias": False,
    "scale_embeddings": False,
}
MARIAN = {
    "architecture": "encoder_decoder",
    "positions": "sinusoidal",
    "norm": "layer",
    "norm_placement": "post",
    "feed_forward": "relu",
    "bias": True,
    "scale_embeddings": True,
    "encoder_layers": 1,
}
FACTS = TrainingFacts(count([np.array([5, 6])], 320, 1))
TRAIN = {"steps": 6, "global_batch_sequences": 4, "micro_batch_sequences": 2}
# What simple_evaluate of lm-eval 0.4.13 gave, without rows and settings.
RECORDED = {
    "results": {
        "colours": {
            "alias": "colours",
            "acc,none": 0.75,
            "acc_stderr,none": 0.25,
            "f1,none": 0.5,
            "f1_stderr,none": "N/A",
            "exact_match,strict": 0.0,
            "exact_match_stderr,strict": 0.0,
        }
    },
    "configs": {"colours": {}},
    "versions": {"colours": 2.0},
    "n-shot": {"colours": 3},
    "higher_is_better": {"colours": {"acc": True, "f1": True, "exact_match": True}},
    "n-samples": {"colours": {"original": 9, "effective": 4}},
    "samples": {"colours": [{"doc_id": i, "prompt_hash": "a", "target_hash": "b"} for i in range(4)]},
}


def config_of(**sections):
    model = {"d_model": 16, "heads": 2, "d_ff": 32, "decoder_layers": 1, **LLAMA, **sections.pop("model", {})}
    data = {
        "corpora": [{"name": "prose", "kind": "text", "path": "/nowhere", "target": "{text}"}],
        "tokenizer": {"vocabulary_size": 320},
        "layout": "pairs" if model["architecture"] == "encoder_decoder" else "sequence",
        "source_tokens": 64,
        "target_tokens": 64,
        **sections.pop("data", {}),
    }
    return parse_config({"model": model, "data": data, "train": TRAIN, **sections}, "test")


def test_options_become_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (change,) = evaluate_overrides(None, None, lm_eval=" arc_easy, own.yaml ,")
    name, value = change.split("=", 1)
    assert name == "evaluate.lm_eval" and json.loads(value) == ["arc_easy", str(tmp_path / "own.yaml")]
    config = config_of(evaluate={"lm_eval": json.loads(value)})
    assert config.evaluate.lm_eval == ("arc_easy", str(tmp_path / "own.yaml"))


def test_the_command_line_knows_the_option():
    assert "--lm-eval" in CliRunner().invoke(evaluate, ["--help"]).output


def test_recorded_results_become_cells():
    (cell,) = cells_of(RECORDED, "0.4.13")
    assert (cell["corpus"], cell["task"], cell["records"], cell["status"]) == ("colours", "lm-eval", 4, "ok")
    assert "0.4.13" in cell["signature"] and "version 2.0" in cell["signature"] and "3 shots" in cell["signature"]
    accuracy, strict = cell["metrics"]
    assert (accuracy["name"], accuracy["value"], accuracy["n"]) == ("acc", 0.75, 4)
    assert accuracy["standard_error"] == 0.25 and accuracy["higher_is_better"] is True
    assert accuracy["low"] == pytest.approx(0.26) and accuracy["high"] == pytest.approx(1.24)
    assert (strict["name"], strict["value"]) == ("exact_match:strict", 0.0)
    assert cell["rows_digest"] == rows_digest(RECORDED["samples"]["colours"][::-1]) != rows_digest([])
    # No interval is made up where the harness gives none.
    assert cell["without_interval"] == {"f1": 0.5}
    lines = table_lines([cell, missing_cell("other", "it broke")])
    assert "acc" in lines[0] and "0.750 [0.260, 1.240]" in lines[0] and lines[-1].endswith("missing: it broke")


def test_without_the_extra_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval and accelerate.*this machine.*pip install 'telar\[lm-eval\]'"):
        harness.check_harness(config_of(evaluate={"lm_eval": ["arc_easy"]}), "this machine")


def test_nothing_is_asked_of_a_run_without_such_tasks(tmp_path):
    assert harness.harness_results(config_of(), Storage(str(tmp_path)), "run", 1, "digest", lambda: False) == ([], [])


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ({"attention": {"kind": "linear"}}, "model.attention.kind"),
        ({"bias": True}, "model.bias"),
        ({"norm": "layer"}, "model.norm"),
    ],
)
def test_models_that_are_not_exported_are_refused_by_field(model, field):
    with pytest.raises(ConfigError, match=rf"evaluate\.lm_eval.*{field}"):
        harness.check_exportable(config_of(model=model))


def test_models_that_are_exported_pass():
    harness.check_exportable(config_of())
    harness.check_exportable(config_of(model=MARIAN))


def test_results_digest_is_as_before_without_such_tasks_and_needs_the_extra_with_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(inputs_digest(config_of(), "checkpoint", "data")) == 32
    with pytest.raises(ConfigError, match="telar"):
        inputs_digest(config_of(evaluate={"lm_eval": ["arc_easy"]}), "checkpoint", "data")


def test_a_task_is_found_by_file_or_by_the_line_that_declares_it(tmp_path, monkeypatch):
    tasks = tmp_path / "tasks"
    for file, text in {
        "one/colours.yaml": "task: colours\n",
        "two/strange_name.yaml": "group: 'shapes'\n",
        "two/other.yaml": "tag: shapes\ntask: triangles # many\n",
    }.items():
        (tasks / file).parent.mkdir(parents=True, exist_ok=True)
        (tasks / file).write_text(text)

    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert harness_tasks.task_file("colours") == tasks / "one/colours.yaml"
    assert harness_tasks.task_file("shapes") == tasks / "two/strange_name.yaml"
    assert harness_tasks.task_file("triangles") == tasks / "two/other.yaml"
    with pytest.raises(ConfigError, match=r"'squares' is declared by no file"):
        harness_tasks.task_file("squares")
    with pytest.raises(ConfigError, match="does not exist"):
        harness_tasks.task_file(str(tmp_path / "own.yaml"))


def test_no_cluster_is_looked_for(monkeypatch):
    monkeypatch.setattr(harness.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(harness.ray, "remote", None)
    with pytest.raises(AssertionError, match="own cluster"):
        harness.on_ray(lambda: None, [()], lambda: False)


def test_two_checkpoints_or_files_never_share_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(harness_tasks, "check_installed", lambda where: None)
    monkeypatch.setattr(harness_tasks.importlib.metadata, "version", lambda name: "0.4.13")
    file = tmp_path / "own.yaml"
    file.write_text("task: own\n")
    keys = [harness_tasks.key_of(str(file), "one"), harness_tasks.key_of(str(file), "other")]
    assert keys[0] == harness_tasks.key_of(str(file), "one")
    (tmp_path / "rows.json").write_text("[]")
    keys.append(harness_tasks.key_of(str(file), "one"))
    assert len(set(keys)) == 3


def rows_of(folder):
    colours = ["red", "green", "blue", "white"]
    rows = [{"ask": f"the sky number {i} is", "choices": colours, "right": i % 4} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def task_yaml(folder, name, **fields):
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{ask}}",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return str(folder / f"{name}.yaml")


def committed_run(folder, model):
    """A run with random weights as step 6, its tokenizer and its data prepared."""
    (folder / "prose.txt").write_text("\n\n".join(f"the red sky number {i} is green and blue" for i in range(40)))
    corpus = {"name": "prose", "kind": "text", "path": str(folder / "prose.txt"), "target": "{text}"}
    pairs = model["architecture"] == "encoder_decoder"
    corpus["continuation"] = pairs
    data = {
        "corpora": [corpus],
        "tokenizer": {"vocabulary_size": 320},
        "layout": "pairs" if pairs else "sequence",
        "source_tokens": 64,
        "target_tokens": 64,
    }
    config = config_of(model=model, data=data, run={"storage": str(folder / "runs"), "seed": 3, "name": "run"})
    storage = Storage(config.run.storage)
    manifest = prepare(config, storage, serial, lambda line: None)
    built = build_model(config.model, manifest.vocabulary_size, seed=9).eval()
    pieces = [
        Fragment(name, WEIGHT, tuple(each.shape), 0, each.detach().flatten()) for name, each in built.named_parameters()
    ]
    checkpoints = storage.child("run", "checkpoints")
    belongs = {"data_digest": manifest.digest, "tokenizer_digest": manifest.tokenizer_digest}
    commit.commit(checkpoints, 6, 1, [write_snapshot(checkpoints, 6, 1, 0, pieces)], 1, belongs)
    storage.write_text("run/config.yaml", to_yaml(config))
    return config, storage, read_tokenizer(storage, manifest), built, manifest


def here(work, arguments, should_stop):
    for each in arguments:
        work(*each)
    return {}


def with_tasks(config, *entries):
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"lm_eval": entries})})


@needs_harness
@pytest.mark.slow
def test_a_decoder_is_judged_by_the_harness_with_the_models_own_likelihoods(tmp_path):
    config, storage, tokenizer, model, _ = committed_run(tmp_path, LLAMA)
    rows = rows_of(tmp_path)
    choosing = {"output_type": "multiple_choice", "doc_to_target": "right", "doc_to_choice": "{{choices}}"}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    file = task_yaml(tmp_path, "colours", metric_list=metrics, **choosing)
    config = with_tasks(config, file)
    cells, facts = harness.harness_results(config, storage, "run", 6, "digest", lambda: False, here)
    (cell,), (fact,) = cells, facts
    assert cell["records"] == 7 and cell["status"] == "ok" and not fact["reused"]
    assert fact["exported_as"] == "LlamaForCausalLM"
    kept = json.loads(storage.read_text(f"run/{fact['rows']}"))
    right = 0
    for row, sample in zip(rows, sorted(kept["samples"]["colours"], key=lambda s: s["doc_id"]), strict=True):
        expected = [likelihood(model, tokenizer, row["ask"], " " + choice) for choice in row["choices"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        right += max(range(4), key=expected.__getitem__) == row["right"]
    assert cell["metrics"][0]["value"] == pytest.approx(right / 7)

    def never(work, arguments, should_stop):
        assert not arguments
        return {}

    again, facts = harness.harness_results(config, storage, "run", 6, "digest", lambda: False, never)
    assert again == cells and facts[0]["reused"]


def likelihood(model, tokenizer, context, continuation):
    """Nats of a continuation after bos and its context, straight from the logits of one row without padding."""
    context, continuation = (tokenizer.encode(text) for text in (context, continuation))
    written = torch.tensor([[tokenizer.bos_id, *context, *continuation]])
    places = torch.arange(written.shape[1])[None]
    nothing = torch.zeros((1, 0), dtype=torch.int64)
    inputs = (nothing, nothing, nothing, written, places, torch.ones_like(written))
    with torch.no_grad():
        scores = model.logits(inputs)[0].double().log_softmax(-1)
    first = len(context)
    return sum(float(scores[first + i, token]) for i, token in enumerate(continuation))


@pytest.fixture
def own_cluster():
    """A cluster of this process alone: an address that is left out may mean the cluster of somebody else."""
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


@needs_harness
@pytest.mark.slow
@pytest.mark.ray
def test_tasks_run_on_the_cluster_and_one_that_fails_is_a_missing_cell(tmp_path, own_cluster):
    config, storage, _, _, manifest = committed_run(tmp_path, MARIAN)
    rows_of(tmp_path)
    written = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    fields = {"output_type": "generate_until", "doc_to_target": "red", "metric_list": metrics}
    good = task_yaml(tmp_path, "writing", generation_kwargs=written, **fields)
    (tmp_path / "other").mkdir()
    bad = task_yaml(tmp_path / "other", "lost", **fields)
    config = with_tasks(config, good, bad)
    cells, facts = harness.harness_results(config, storage, "run", 6, "digest", lambda: False)
    assert [(cell["status"], cell["records"]) for cell in cells] == [("ok", 7), ("missing", 0)]
    assert "rows.jsonl" in cells[1]["detail"] and len(facts) == 1 and facts[0]["exported_as"] == "MarianMTModel"

    # The evaluate stage adds such cells to its own and is done; what is missing would fail it.
    config = with_tasks(config, good)
    serial_runner = SerialRunner(partial(load_evaluator, EvaluatorTask(config, storage.url, "run", 6)))
    arguments = (config, storage, "run", manifest, 6)
    results = stage.evaluate(*arguments, lambda line: None, lambda: False, serial_runner, lambda: FACTS)
    assert [cell["corpus"] for cell in results["cells"] if cell["task"] == "lm-eval"] == ["writing"]
    assert results["lm_eval"][0]["exported_as"] == "MarianMTModel" and not results["failed"]
    assert stage.is_done(*arguments)
    Path(good).write_text(Path(good).read_text() + "num_fewshot: 0\n")
    assert not stage.is_done(*arguments)
