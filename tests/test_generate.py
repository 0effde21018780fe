"""`telar generate` on a run of two checkpoints: what it prints, averages and refuses."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner

from cluster import commit
from cluster.storage import Storage
from configs.load import parse_config, to_yaml
from data.manifest import Manifest
from data.prepare import prepare
from data.runners import serial
from data.tokenizer import read_tokenizer
from jobs.cli import cli
from jobs.commands.generating import Growing
from jobs.loading import load_trained
from model.checkpoint import write_snapshot
from model.fragments import WEIGHT, Fragment
from model.generation import greedy
from model.transformer import build_model
from tests.test_end_to_end import TINY, write_corpus

STEPS = (3, 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Storage with a run `demo` whose commits hold two random models; those models by step."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    section = {**TINY, "data": {**TINY["data"]}}
    section["data"]["corpora"] = [{**each, "path": str(folder / "code")} for each in TINY["data"]["corpora"]]
    config = parse_config(section, "test")
    storage = Storage(str(folder / "runs"))
    manifest = prepare(config, storage, serial, lambda line: None)
    models = {}
    for step in STEPS:
        models[step] = build_model(config.model, manifest.vocabulary_size, seed=step).eval()
        save(storage, manifest, models[step], step, manifest.tokenizer_digest)
    storage.write_text("demo/config.yaml", to_yaml(config))
    return storage, manifest, config, models


def save(storage, manifest, model, step, tokenizer_digest):
    pieces = [Fragment(n, WEIGHT, tuple(p.shape), 0, p.detach().flatten()) for n, p in model.named_parameters()]
    checkpoints = storage.child("demo", "checkpoints")
    file = write_snapshot(checkpoints, step, 1, 0, pieces)
    extra = {"data_digest": manifest.digest, "tokenizer_digest": tokenizer_digest}
    commit.commit(checkpoints, step, 1, [file], 1, extra)


def run(trained, *arguments, text=None):
    return CliRunner().invoke(cli, ["generate", f"{trained[0].url}/demo", *arguments], input=text)


def test_it_prints_what_the_model_answers(trained):
    storage, manifest, _, models = trained
    tokenizer = read_tokenizer(storage, manifest)
    texts = ["complete: def load_table(table):", "summarize: x"]
    sources = [tokenizer.encode(text) for text in texts]
    expected = [tokenizer.decode(o) for o in greedy(models[6], sources, tokenizer.bos_id, tokenizer.eos_id, 7)]
    assert run(trained, texts[0], "--max-new-tokens", "7").output == expected[0] + "\n"
    outputs = json.loads(run(trained, *texts, "--max-new-tokens", "7", "--json").output)["outputs"]
    assert [output["text"] for output in outputs] == expected
    assert run(trained, "--max-new-tokens", "7", text="\n".join(texts)).output == "".join(f"{e}\n" for e in expected)
    older = greedy(models[3], sources[:1], tokenizer.bos_id, tokenizer.eos_id, 7)
    assert run(trained, texts[0], "--max-new-tokens", "7", "--step", "3").output == tokenizer.decode(older[0]) + "\n"


def test_drawn_outputs_depend_on_the_seed(trained):
    def drawn(*more):
        return run(trained, "summarize: x", "--temperature", "3", "--max-new-tokens", "12", *more).output

    assert drawn() == drawn() != drawn("--seed", "1")


def test_an_average_is_the_mean_of_the_checkpoints(trained):
    storage, _, config, models = trained
    found = load_trained(storage, "demo", config, average=2)
    assert found.steps == STEPS
    ours, theirs = models[3].state_dict(), models[6].state_dict()
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, (ours[name] + theirs[name]) / 2)


def test_an_exported_run_generates_the_same_in_transformers(trained, tmp_path):
    target = tmp_path / "deep" / "hf"
    arguments = ["export", f"{trained[0].url}/demo", "--to", "hf", str(target)]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert json.loads(done.output)["class"] == "MarianMTModel"
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(target)
    text = "complete: def load_table(table):"
    inputs = tokenizer([text], return_tensors="pt", add_special_tokens=False)
    theirs = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=7, num_beams=1
    )
    expected = tokenizer.decode(theirs[0], skip_special_tokens=True)
    assert run(trained, text, "--max-new-tokens", "7").output == expected + "\n"
    again = CliRunner().invoke(cli, arguments)
    assert "exists" in str(again.exception) and [path.name for path in target.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--step", "4"], "step 4"),
        (["x", "--average", "3"], "checkpoint.keep"),
        (["  "], "TEXT 1 is empty"),
        (["x", "--beams", "2", "--top-k", "3"], "--beams"),
    ],
)
def test_what_cannot_be_done_is_refused(trained, arguments, message):
    done = run(trained, *arguments)
    assert done.exit_code != 0 and message in str(done.exception)


def test_a_checkpoint_of_another_tokenizer_is_refused(trained):
    storage, manifest, _config, models = trained
    save(storage, manifest, models[6], 9, "another")
    try:
        assert Manifest.read(storage, manifest.folder).tokenizer_digest != "another"
        done = run(trained, "x")
        assert done.exit_code != 0
        assert "another" in str(done.exception) and manifest.tokenizer_digest in str(done.exception)
    finally:
        storage.child("demo", "checkpoints").remove("step-9")
        storage.child("demo", "checkpoints").remove(commit.step_folder(9))


def test_characters_are_written_whole():
    parts, written = "a\u00e9\U0001f600b".encode(), []

    def decode(tokens):
        return bytes(tokens).decode(errors="replace")

    growing = Growing(decode, written.append)
    for byte in parts:
        growing.add(byte)
    growing.end()
    assert written == ["a", "\u00e9", "\U0001f600", "b"]
    cut = Growing(decode, written.append)
    cut.add(parts[1])
    cut.end()
    assert written[-1] == "\ufffd"
