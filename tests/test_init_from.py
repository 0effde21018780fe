"""`model.init_from`: runs that start from a directory of transformers, and the losses that transformers computes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.storage import Storage
from configs.errors import ConfigError, DataError
from configs.load import load_config, parse_config
from data.inputs import read_given_tokenizer
from data.loader import Loader
from data.manifest import Manifest, folder_of
from data.opener import plain_opener
from data.tokenizer import Tokenizer
from jobs.batches import to_model
from jobs.commands.exporting import export_run
from jobs.commands.paths import with_absolute_paths
from jobs.commands.runs import locate
from jobs.loading import load_trained
from jobs.pretrained import initial_parameters

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"the {a} {b} sees {c} birds" for a in ("old", "red") for b in ("cat", "dog", "man") for c in range(8)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A corpus, a configuration, and a small Llama with a tokenizer of its own whose special tokens are <s>, </s>."""
    folder = tmp_path_factory.mktemp("hf")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    theirs.save_pretrained(folder / "llama")
    config = transformers.LlamaConfig(
        vocab_size=len(theirs),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    corpus = {"name": "birds", "kind": "text", "path": "corpus.txt", "target": "{text}", "continuation": True}
    (folder / "corpus.txt").write_text("\n\n".join(TEXTS))
    tree = {
        "run": {"seed": 5},
        "cluster": {"device": "cpu"},
        "data": {
            "corpora": [corpus],
            "layout": "sequence",
            "packing": "none",
            "target_tokens": 32,
            "held_out_fraction": 0.2,
        },
        "model": {"init_from": "hf:llama", "dropout": 0.0},
        "optimizer": {"schedule": "constant", "learning_rate": 1e-30, "warmup_steps": 1},
        "train": {"steps": 2, "global_batch_sequences": 4, "micro_batch_sequences": 2, "label_smoothing": 0.0},
        "evaluate": {"bootstrap_rounds": 100},
    }
    (folder / "tune.yaml").write_text(yaml.safe_dump(tree))
    return folder


def train(project, name, *more):
    return subprocess.run(
        [sys.executable, "-m", "jobs.train_local", "tune.yaml", "--set", f"run.name={name}", *more],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_run_starts_from_the_weights_and_goes_out_again_unchanged(project):
    done = train(project, "tuned")
    assert done.returncode == 0, done.stdout + done.stderr
    run = project / "runs" / "tuned"
    config = parse_config(yaml.safe_load((run / "config.yaml").read_text()), "run")
    assert (config.model.d_model, config.model.heads_of_keys, config.model.rotary_base) == (32, 2, 777.0)
    storage = Storage(str(project / "runs"))
    (folder,) = (project / "runs" / "data").iterdir()
    manifest = Manifest.read(storage, folder_of(folder.name))
    theirs = transformers.LlamaForCausalLM.from_pretrained(project / "llama").eval()
    assert (manifest.bos_id, manifest.eos_id, manifest.vocabulary_size) == (1, 2, theirs.config.vocab_size + 1)

    loader, wanted = Loader(manifest, config, plain_opener(storage, manifest), 0, 1), []
    for _ in range(2):
        nats, count = 0.0, 0
        for batch in loader.next_step():
            ours = to_model(batch)
            # Only padding is beyond their vocabulary, and it is masked.
            tokens = ours.inputs[3].clamp(max=theirs.config.vocab_size - 1)
            segments, labels, kept = ours.inputs[5], ours.labels, ours.loss_weight > 0
            with torch.no_grad():
                logits = theirs(input_ids=tokens, attention_mask=segments > 0).logits
            nats += torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
            count += int(kept.sum())
        wanted.append(nats / count)
    loader.close()
    found = [json.loads(line)["nll"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # One token more, for padding, takes a share of about 1 / vocabulary of the probability.
    room = 3 / manifest.vocabulary_size
    assert len(found) == 2 and all(0 < one - other < room for one, other in zip(found, wanted, strict=True))
    assert all(other > math.log(manifest.vocabulary_size) - 1 for other in wanted)

    export_run(locate("tuned", str(project / "runs")), str(project / "out"))
    before, after = (load_file(project / name / "model.safetensors") for name in ("llama", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name

    # And in again: what went out has a token for each row, padding included.
    again = resolved(project, f"model.init_from=hf:{project}/out")
    size = Tokenizer.load(read_given_tokenizer(again.data.tokenizer)).vocabulary_size
    assert size == manifest.vocabulary_size == len(after["lm_head.weight"])
    started = initial_parameters(again.model, size, seed=1)
    trained = load_trained(storage, "tuned", config).model.named_parameters()
    assert again.model == config.model.model_copy(update={"init_from": f"hf:{project}/out"})
    assert all(torch.equal(started.pop(name), value) for name, value in trained) and not started


@pytest.mark.slow
def test_a_run_with_a_checkpoint_never_asks_for_the_weights_again(project):
    assert train(project, "kept").returncode == 0
    (project / "llama" / "model.safetensors").rename(project / "away")
    try:
        done = train(project, "kept", "--resume", "--set", "train.steps=3")
        with pytest.raises(ConfigError, match=r"llama/model\.safetensors cannot be read"):
            initial_parameters(resolved(project).model, 300, 0)
    finally:
        (project / "away").rename(project / "llama" / "model.safetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((project / "runs" / "kept" / "metrics.jsonl").read_text().splitlines()) == 3


def test_their_tokenizer_gives_the_same_ids_and_never_a_special_token_from_text(project):
    theirs = transformers.AutoTokenizer.from_pretrained(project / "llama")
    config = with_absolute_paths(load_config(str(project / "tune.yaml"), []), str(project / "tune.yaml"), check=True)
    ours = Tokenizer.load(read_given_tokenizer(config.data.tokenizer))
    for text in (*TEXTS[:5], "Grüße, 12 birds!\n"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert not {ours.bos_id, ours.eos_id, ours.pad_id} & set(ours.encode("<s> <bos> </s> <pad>"))


def test_weights_in_several_files_are_read_by_their_index(project, tmp_path):
    whole = load_file(project / "llama" / "model.safetensors")
    (tmp_path / "config.json").write_text((project / "llama" / "config.json").read_text())
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: whole[name] for name in own}, tmp_path / file)
    placed = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = with_absolute_paths(load_config(str(project / "tune.yaml"), []), str(project / "tune.yaml"), check=True)
    vocabulary = len(whole["model.embed_tokens.weight"])
    one, other = (
        initial_parameters(config.model.model_copy(update={"init_from": f"hf:{place}"}), vocabulary, 0)
        for place in (project / "llama", tmp_path)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    del placed["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ConfigError, match=r"lacks the weight model\.norm\.weight"):
        initial_parameters(config.model.model_copy(update={"init_from": f"hf:{tmp_path}"}), vocabulary, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_from=hf:nowhere", r"model\.init_from: .*/nowhere/config\.json cannot be read"),
        ("model.init_from=llama", r"model\.init_from: 'llama' must be hf:DIR"),
        ("model.d_model=64", r"model\.d_model: 64 is given, the weights of .*/llama have 32"),
        ("data.tokenizer.bos=<s>", "it names a token of a tokenizer that is loaded"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(project, override, message):
    file = str(project / "tune.yaml")
    with pytest.raises(ConfigError, match=message):
        with_absolute_paths(load_config(file, [override]), file, check=True)


def resolved(project, *overrides):
    file = str(project / "tune.yaml")
    return with_absolute_paths(load_config(file, overrides), file, check=True)


def test_another_tokenizer_than_that_of_the_weights_is_refused(project, tmp_path):
    rows = json.loads((project / "llama" / "config.json").read_text())["vocab_size"]
    tree = json.loads((project / "llama" / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[40:42]
    given = ["data.tokenizer.bos=<s>", "data.tokenizer.eos=</s>", f"data.tokenizer.path={tmp_path}/other.json"]

    def other(tokens):
        content = json.dumps({**tree, "model": {**tree["model"], "vocab": tokens, "merges": []}})
        (tmp_path / "other.json").write_text(content)

    other({**vocabulary, a: j, b: i})
    message = (
        rf"data\.tokenizer\.path: .*other\.json has {rows + 1} tokens, the weights of .*/llama have embeddings of "
        rf"{rows} others \(.* is {i} there and {j} here\); remove data\.tokenizer"
    )
    with pytest.raises(ConfigError, match=message):
        resolved(project, *given)
    other({token: number for token, number in vocabulary.items() if number < 50})
    with pytest.raises(ConfigError, match=rf"has 51 tokens, .* embeddings of {rows} others \(.* absent here\)"):
        resolved(project, *given)
    # One that goes on where theirs ends is no other.
    other({**vocabulary, "more": len(vocabulary)})
    assert resolved(project, *given).data.tokenizer.path == f"{tmp_path}/other.json"


def test_a_directory_without_tokenizer_needs_one_that_is_as_large(project, tmp_path):
    rows = json.loads((project / "llama" / "config.json").read_text())["vocab_size"]
    (tmp_path / "config.json").write_text((project / "llama" / "config.json").read_text())
    given = [f"model.init_from=hf:{tmp_path}", "data.tokenizer.bos=<s>", "data.tokenizer.eos=</s>"]
    assert resolved(project, *given, "data.tokenizer.path=llama/tokenizer.json").model.d_model == 32
    tree = json.loads((project / "llama" / "tokenizer.json").read_text())
    tree["model"] |= {"vocab": {token: i for token, i in tree["model"]["vocab"].items() if i < 50}, "merges": []}
    (tmp_path / "small.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=rf"has 51 tokens, .* {rows} others \({rows - 51} rows have no token\)"):
        resolved(project, *given, f"data.tokenizer.path={tmp_path}/small.json")


def test_rows_without_a_token_are_left_out_and_tokens_without_a_row_are_new(project, caplog):
    model, whole = resolved(project).model, load_file(project / "llama" / "model.safetensors")
    rows = len(whole["lm_head.weight"])
    with caplog.at_level("INFO"):
        fewer = initial_parameters(model, rows - 7, 0)
    assert "the last 7 of" in caplog.text
    more, other = (initial_parameters(model, rows + 2, seed) for seed in (0, 1))
    for ours, theirs in (("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
        assert torch.equal(fewer[ours], whole[theirs][:-7])
        assert torch.equal(more[ours][:rows], whole[theirs]) and (more[ours][rows:] != other[ours][rows:]).all()


def test_special_tokens_that_are_not_there_are_named(project):
    file = str(project / "tune.yaml")
    overrides = ["data.tokenizer.path=llama/tokenizer.json", "data.tokenizer.bos=<start>", "data.tokenizer.eos=</s>"]
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: .* the vocabulary has no <start>; correct data\.tok"):
        with_absolute_paths(load_config(file, overrides), file, check=True)
