"""`telar compress`: runs made of a run, and what generate, evaluate, export, report and training make of them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import parse_config, to_yaml
from data.prepare import prepare
from data.runners import serial
from data.state import make_state
from jobs import compression_figures, evaluate
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.cli import cli
from jobs.commands.runs import RunPlace
from jobs.compression import Compression
from jobs.loading import load_trained
from jobs.references import write_references
from model.checkpoint import CheckpointReader, load_state, write_snapshot
from model.fragments import WEIGHT, Fragment
from model.generation import greedy
from model.quantize import dense_parameters, memory_bytes, quantize
from model.transformer import build_model
from tests.test_end_to_end import TINY, write_corpus
from tests.test_evaluate import SerialRunner

STEP = 3
TEXT = "complete: def load_table(table):"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Storage with a run `demo` whose commit holds a random model and moments; the model."""
    folder = tmp_path_factory.mktemp("compress")
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    section = {**TINY, "data": {**TINY["data"]}, "model": {**TINY["model"], "d_model": 64}}
    section["data"]["corpora"] = [{**each, "path": str(folder / "code")} for each in TINY["data"]["corpora"]]
    config = parse_config(section, "test")
    storage = Storage(str(folder / "runs"))
    manifest = prepare(config, storage, serial, lambda line: None)
    model = build_model(config.model, manifest.vocabulary_size, seed=3).eval()
    pieces = [
        Fragment(name, state, tuple(p.shape), 0, (p.detach() * factor).flatten())
        for state, factor in ((WEIGHT, 1.0), ("exp_avg", 0.1), ("exp_avg_sq", 0.01))
        for name, p in model.named_parameters()
    ]
    checkpoints = storage.child("demo", "checkpoints")
    file = write_snapshot(checkpoints, STEP, 1, 0, pieces)
    samples = STEP * config.train.global_batch_sequences
    extra = {
        "data_digest": manifest.digest,
        "tokenizer_digest": manifest.tokenizer_digest,
        "data_state": make_state(manifest, config, samples, []),
        "tokens": 100,
    }
    commit.commit(checkpoints, STEP, 1, [file], 1, extra)
    write_references(storage.child("demo"), manifest, None)
    storage.write_text("demo/config.yaml", to_yaml(config))
    return storage, manifest, config, model


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(compression_figures, "NEW_TOKENS", 2)
    monkeypatch.setattr(compression_figures, "ROUNDS", 1)


def compress(trained, *arguments, run="demo"):
    done = CliRunner().invoke(cli, ["compress", f"{trained[0].url}/{run}", *arguments, "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def config_of(trained, run):
    return RunPlace(trained[0], run).config()


def loaded(trained, run):
    return load_trained(trained[0], run, config_of(trained, run))


@pytest.mark.parametrize(("kind", "ratio"), [("int8-weight", 3.5), ("int8-dynamic", 3.5), ("int4-group", 5.5)])
def test_a_quantized_run_is_a_run(trained, kind, ratio, tmp_path):
    storage, manifest, config, model = trained
    name = f"quantized-{kind}"
    made = compress(trained, "--quantize", kind, "--group", "32", "--name", name)
    assert made["run"] == name and made["source"]["run"] == "demo" and made["compression"]["quantize"] == kind

    # The table: sizes are those of the files and tensors, losses those of the models.
    before, after = made["rows"]
    found = loaded(trained, name)
    file = storage.size(f"{name}/checkpoints/step-00000003/attempt-001/rank-00000.safetensors")
    assert 0 <= file - after["disk_bytes"] < 64
    assert after["memory_bytes"] == memory_bytes(found.model)
    assert before["memory_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    # Matrices are narrow here: biases and norms weigh more than in test_quantize.
    assert before["memory_bytes"] / after["memory_bytes"] >= ratio
    assert before["disk_bytes"] / after["disk_bytes"] >= 0.8 * ratio
    assert before["tokens"] == after["tokens"] > 0 and math.isclose(before["nll"], after["nll"], rel_tol=0.02)
    assert after["tokens_per_second"]["32"]["median"] > 0

    # generate: the same as the model quantized in memory.
    expected = build_model(config.model, manifest.vocabulary_size, 0).eval()
    expected.load(dict(model.named_parameters()))
    quantize(expected, kind, 32)
    done = CliRunner().invoke(cli, ["generate", f"{storage.url}/{name}", TEXT, "--max-new-tokens", "6", "--json"])
    ids = found.tokenizer.encode_batch([TEXT], found.tokenizer.prefix_of(TEXT))[0]
    output = greedy(expected, [list(ids)], found.tokenizer.bos_id, found.tokenizer.eos_id, 6)[0]
    assert json.loads(done.output)["outputs"][0]["text"] == found.tokenizer.show(output)

    # export: the unpacked weights.
    target = tmp_path / "hf"
    done = CliRunner().invoke(cli, ["export", f"{storage.url}/{name}", "--to", "hf", str(target), "--json"])
    assert json.loads(done.output)["parameters"] == sum(p.numel() for p in model.parameters())
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(target)
    unpacked = dense_parameters(found.model)["encoder_0.feed_forward.inner.weight"]
    torch.testing.assert_close(theirs.state_dict()["model.encoder.layers.0.fc1.weight"], unpacked)

    # report, and the state that `telar status` shows.
    done = CliRunner().invoke(cli, ["report", f"{storage.url}/{name}"])
    page = storage.read_text(f"{name}/report.html")
    assert f"{kind}" in page and "nats per token" in page and "compressed" in page
    assert json.loads(storage.read_text(f"{name}/status.json"))["state"] == "finished"


def test_a_compressed_run_is_evaluated(trained):
    storage, manifest, _config, _model = trained
    compress(trained, "--quantize", "int8-weight", "--name", "judged")
    config = config_of(trained, "judged")
    runner = SerialRunner(lambda: load_evaluator(EvaluatorTask(config, storage.url, "judged", STEP)))
    arguments = (config, storage, "judged", manifest, STEP, lambda line: None, lambda: False)
    results = evaluate.evaluate(*arguments, runner=runner)
    nll = next(metric for metric in results["cells"][0]["metrics"] if metric["name"] == "nll")
    record = json.loads(storage.read_text("judged/compression.json"))
    assert nll["value"] == pytest.approx(record["rows"][1]["nll"], rel=0.2)
    assert evaluate.is_done(config, storage, "judged", manifest, STEP)
    # Fewer records than the table takes at most: the same answers, so the same figures of the tasks.
    judged = {(cell["corpus"], metric["name"]): metric for cell in results["cells"] for metric in cell["metrics"]}
    found = record["rows"][1]["tasks"]
    assert {figure["corpus"] for figure in found} == {corpus.name for corpus in config.data.corpora}
    for figure in found:
        same = judged[figure["corpus"], figure["name"]]
        assert (figure["value"], figure["n"]) == (same["value"], same["n"]) and figure["n"] <= 64
    page = CliRunner().invoke(cli, ["report", f"{storage.url}/judged"])
    assert page.exit_code == 0 and found[0]["label"] in storage.read_text("judged/report.html")


def test_a_structurally_pruned_run_is_smaller_and_can_be_quantized(trained):
    storage, _manifest, config, model = trained
    made = compress(trained, "--prune", "0.5", "--name", "pruned")
    smaller = config_of(trained, "pruned")
    assert (smaller.model.heads, smaller.model.head_width, smaller.model.d_ff) == (1, 32, 32)
    assert smaller.train.steps == STEP and smaller.data == config.data
    found = loaded(trained, "pruned")
    assert found.model.encoder_0.attention.query.weight.shape == (32, 64)
    parameters = sum(p.numel() for p in found.model.parameters())
    assert parameters < sum(p.numel() for p in model.parameters())
    committed = commit.read_commit(storage.child("pruned", "checkpoints"), STEP)
    assert committed.manifest["parameters"] == parameters
    with CheckpointReader(storage.child("pruned", "checkpoints"), committed) as reader:
        assert set().union(*reader.states().values()) == {WEIGHT}
    assert made["rows"][1]["disk_bytes"] < made["rows"][0]["disk_bytes"]

    both = compress(trained, "--quantize", "int8-weight", run="pruned")
    assert both["run"] == "pruned-int8-weight"
    assert both["rows"][1]["memory_bytes"] < both["rows"][0]["memory_bytes"] / 3
    for run, arguments in (("pruned", ["--prune", "0.5"]), ("pruned-int8-weight", ["--quantize", "int4-group"])):
        with pytest.raises(ConfigError, match="compressed already"):
            compress(trained, *arguments, "--name", "more", run=run)
    assert not storage.exists("more")


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_an_unstructured_run_has_zeros(trained, method):
    made = compress(trained, "--prune", "0.5", "--method", method, "--pattern", "2:4")
    assert made["run"] == f"demo-{method}-2-4"
    weight = loaded(trained, made["run"]).model.encoder_0.feed_forward.outer.weight
    assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--quantize, --prune"),
        (["--quantize", "int8-weight", "--prune", "0.3"], "--quantize, --prune"),
        (["--quantize", "int3"], "int3.*int8-weight"),
        (["--quantize", "int4-group", "--group", "48"], "--group: 48"),
        (["--prune", "0.3", "--method", "random"], "random.*structured"),
        (["--prune", "0"], "--prune: 0 "),
        (["--prune", "1"], "--prune: 1 "),
        (["--prune", "-0.5"], "--prune: -0.5"),
        (["--prune", "nan"], "--prune: nan"),
        (["--prune", "0.001"], "rounds to none"),
        (["--prune", "0.5", "--pattern", "2:4"], "--pattern"),
        (["--prune", "0.4", "--method", "wanda", "--pattern", "2:4"], "--pattern"),
        (["--prune", "0.5", "--method", "wanda", "--pattern", "1:4"], "1:4"),
        (["--prune", "0.5", "--method", "wanda", "--recover-steps", "5"], "--recover-steps"),
        (["--quantize", "int4-group", "--group", "32", "--recover-steps", "5"], "--group: .* groups of 64"),
        (["--quantize", "int8-weight", "--recover-steps", "-1"], "--recover-steps"),
        (["--quantize", "int8-weight", "--step", "4"], "step 4"),
        (["--quantize", "int8-weight", "--name", "demo"], "--name: 'demo' exists"),
        (["--quantize", "int8-weight", "--name", "a/b"], "--name"),
        (["--quantize", "int8-weight", "--name", "data"], "--name"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(trained, arguments, message):
    names = trained[0].names()
    with pytest.raises(ConfigError, match=message):
        compress(trained, *arguments)
    assert trained[0].names() == names


def test_a_run_without_a_checkpoint_is_refused(trained):
    storage = trained[0]
    storage.write_text("young/config.yaml", storage.read_text("demo/config.yaml"))
    try:
        with pytest.raises(ConfigError, match="no committed checkpoint"):
            compress(trained, "--quantize", "int8-weight", run="young")
    finally:
        storage.remove("young")


def test_half_written_runs_are_removed(trained, monkeypatch):
    def fails(*_arguments):
        raise OSError("no space left")

    monkeypatch.setattr("jobs.compressed_run.to_yaml", fails)
    with pytest.raises(OSError, match="no space left"):
        compress(trained, "--quantize", "int8-weight", "--name", "cut-off")
    assert "cut-off" not in trained[0].names()
    monkeypatch.undo()
    # So is one whose figures are missing: it would look finished.
    monkeypatch.setattr("jobs.compress.figures", fails)
    with pytest.raises(OSError, match="no space left"):
        compress(trained, "--quantize", "int8-weight", "--name", "cut-off")
    assert "cut-off" not in trained[0].names()


def test_labels_name_runs():
    labels = [Compression(quantize="int4-group"), Compression(prune=0.3), Compression(prune=0.125, method="wanda")]
    labels.append(Compression(quantize="int8-weight", recover_steps=9))
    assert [each.label for each in labels] == ["int4-group-64", "structured-30", "wanda-12_5", "int8-weight-trained"]


@pytest.fixture
def command(tmp_path):
    """Runs `python -m MODULE ARGUMENTS` beside tiny.yaml and returns what it prints."""
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "parallelism": {"data": 1}}))
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("jobs.train_local", "tiny.yaml", "--set", "run.name=whole")
    return run


@pytest.mark.slow
def test_a_quantized_run_may_have_trained_on_rounded_weights(command, tmp_path):
    arguments = ("compress", "runs/whole", "--quantize", "int4-group", "--recover-steps", "4", "--json")
    made = json.loads(command("jobs.cli", *arguments))
    storage, name = Storage(str(tmp_path / "runs")), "whole-int4-group-64-trained"
    labels = ["before", "int4-group-64", "int4-group-64, 4 steps before"]
    assert made["run"] == name and [row["label"] for row in made["rows"]] == labels
    between = RunPlace(storage, f"{name}-float")
    assert between.config().train.quantize == "int4" and between.config().train.steps == 10
    steps = [json.loads(line)["step"] for line in storage.read_text(f"{name}-float/metrics.jsonl").splitlines()]
    assert steps == [7, 8, 9, 10]
    # The packed weights are those of the run between, rounded.
    packed = load_trained(storage, name, RunPlace(storage, name).config())
    trained = load_trained(storage, between.name, between.config())
    quantize(trained.model, "int4-group")
    expected, found = dense_parameters(trained.model), dense_parameters(packed.model)
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    assert made["rows"][2]["disk_bytes"] == made["rows"][1]["disk_bytes"] < made["rows"][0]["disk_bytes"] / 3
    assert packed.config.train.quantize is None and packed.steps == (10,)


@pytest.mark.slow
def test_a_pruned_run_goes_on_training_from_its_moments(command, tmp_path):
    made = json.loads(command("jobs.cli", "compress", "runs/whole", "--prune", "0.5", "--recover-steps", "4", "--json"))
    storage = Storage(str(tmp_path / "runs"))
    name = "whole-structured-50"
    assert [row["label"] for row in made["rows"]] == ["before", "structured-50", "structured-50, 4 more steps"]
    assert commit.committed_steps(storage.child(name, "checkpoints"))[-1] == 10
    steps = [json.loads(line)["step"] for line in storage.read_text(f"{name}/metrics.jsonl").splitlines()]
    assert steps == [7, 8, 9, 10]
    assert made["rows"][2]["memory_bytes"] == made["rows"][1]["memory_bytes"] < made["rows"][0]["memory_bytes"]
    # Moments went along: those of the pruned checkpoint are a part of the whole run's.
    moments = {}
    for run_name in ("whole", name):
        checkpoints = storage.child(run_name, "checkpoints")
        with CheckpointReader(checkpoints, commit.read_commit(checkpoints, 6)) as reader:
            moments[run_name] = load_state(reader, "exp_avg")
    whole, pruned = (moments[each]["encoder_0.feed_forward.inner.bias"] for each in ("whole", name))
    assert len(pruned) == 32 and set(pruned.tolist()) <= set(whole.tolist()) and pruned.abs().sum() > 0
