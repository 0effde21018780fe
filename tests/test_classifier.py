"""An encoder with a classification head, from pairs whose targets are labels to `telar generate`."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from cluster.storage import Storage
from configs.errors import ConfigError, DataError
from configs.load import load_config, to_yaml
from data.batches import Collator
from data.ring import Arrays
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.batches import to_model
from jobs.classes import Classes
from jobs.cli import cli
from jobs.evaluate import evaluate
from jobs.fan_out import SerialRunner
from jobs.loading import load_trained
from jobs.train_local import train_locally
from jobs.trainable import check_trainable

LABELS = ("good", "quite bad")
GOOD, BAD = ["lovely", "brilliant", "sweet", "warm"], ["dull", "tedious", "flat", "cold"]
FILLER = ["the", "film", "was", "a", "story", "of", "its", "cast", "and", "plot"]


def reviews(count, seed):
    """Ten words of which two say what is thought."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = [chance.choice(FILLER) for _ in range(8)] + [chance.choice((GOOD, BAD)[label]) for _ in range(2)]
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": LABELS[label]})
    return rows


@pytest.fixture
def file(tmp_path):
    lines = [json.dumps(row) for row in reviews(400, 0)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    corpus = {"name": "reviews", "kind": "jsonl", "path": "reviews.jsonl", "task": "sentiment"}
    tree = {
        "run": {"name": "reviews", "storage": str(tmp_path / "runs")},
        "data": {
            "corpora": [{**corpus, "source": "{text}", "target": "{label}"}],
            "tokenizer": {"vocabulary_size": 320},
            "source_tokens": 64,
            "target_tokens": 16,
            "held_out_fraction": 0.2,
        },
        "model": {
            "architecture": "encoder", "labels": list(LABELS), "d_model": 32, "heads": 2, "d_ff": 64,
            "encoder_layers": 1, "dropout": 0.0,
        },
        "optimizer": {"schedule": "cosine", "learning_rate": 0.003, "warmup_steps": 5},
        "train": {"steps": 40, "global_batch_sequences": 8, "micro_batch_sequences": 8},
        "checkpoint": {"every_steps": 40},
        "evaluate": {"bootstrap_rounds": 100},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


class Words:
    """A tokenizer of single words."""

    eos_id = 1

    def encode_batch(self, texts, prefix=None):
        return [np.array([10 + sum(map(ord, word)) for word in text.split()], dtype=np.int32) for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_every_pair_of_a_row_becomes_one_position_with_its_class():
    tokenizer = Words()
    classes = Classes(LABELS, tokenizer)
    good, bad = (np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(LABELS))
    source = np.arange(20, 26, dtype=np.int32)
    collator = Collator(False, 2, 8, 12, pad_id=0, bos_id=2)
    rows = [
        (source, np.array([2, 4]), np.concatenate([bad, good]), np.array([3, 2])),
        (source[:3], np.array([3]), good, np.array([2])),
    ]
    plain = collator.fill(rows, 5, Arrays.empty(*collator.sizes))
    batch = classes.batch(to_model(plain))
    assert batch.index == 5 and batch.labels.tolist() == [[1, 0], [0, 0]]
    assert batch.inputs[5].tolist() == [[1, 2], [1, 0]] and batch.loss_weight.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert torch.equal(batch.inputs[0], torch.from_numpy(plain.source_tokens))
    # Copies that keep replicas in step have no say.
    assert not classes.batch(to_model(plain.without_weight(9))).loss_weight.any()
    other = np.array([99, tokenizer.eos_id], dtype=np.int32)
    wrong = [(source, np.array([6]), other, np.array([2]))]
    with pytest.raises(DataError, match="the target '99 1' is none of them"):
        classes.batch(to_model(collator.fill(wrong, 0, Arrays.empty(*collator.sizes))))
    with pytest.raises(DataError, match="'ab' and 'ba' are the same tokens"):
        Classes(["ab", "ba"], tokenizer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.labels=[]"], "model.labels: an encoder classifies; name the targets"),
        (["model.labels=[a]"], r"labels: \['a'\] must be two or more different texts"),
        (["model.classes=3"], "classes: 3 for 2 labels; remove classes"),
        (["model.architecture=decoder"], "labels: model.architecture decoder writes its targets"),
        (["data.corpora.0.task=translation"], "task: translation asks for text, which an encoder does not write"),
        (["data.layout=sequence", "data.packing=chunk"], "data.layout: an encoder reads sources alone"),
    ],
)
def test_what_does_not_fit_an_encoder_is_named(file, changes, words):
    check_trainable(load_config(file))
    with pytest.raises(ConfigError, match=words):
        check_trainable(load_config(file, changes))


@pytest.mark.slow
def test_an_encoder_learns_labels_is_evaluated_and_says_them(file):
    config = load_config(file, [f"data.corpora.0.path={file.parent}/reviews.jsonl"])
    storage = Storage(config.run.storage)
    storage.write_text("reviews/config.yaml", to_yaml(config))
    assert train_locally(config, storage, "reviews") == 0
    found = load_trained(storage, "reviews", config, 40)
    runner = SerialRunner(partial(load_evaluator, EvaluatorTask(config, storage.url, "reviews", 40)))
    results = evaluate(config, storage, "reviews", found.manifest, 40, print, lambda: False, runner=runner)
    (cell,) = results["cells"]
    assert cell["task"] == "sentiment"
    (accuracy,) = [metric for metric in cell["metrics"] if metric["name"] == "accuracy"]
    assert accuracy["value"] > 0.95, accuracy
    # The same probabilities as the head's softmax over the source alone.
    text = "the cast was lovely and sweet"
    said = CliRunner().invoke(cli, ["generate", f"{storage.url}/reviews", text, "--json"])
    (output,) = json.loads(said.stdout)["outputs"]
    ids = torch.from_numpy(found.tokenizer.encode_batch([text])[0].astype(np.int64))[None]
    ones = torch.ones_like(ids, dtype=torch.int32)
    places = torch.arange(ids.shape[1], dtype=torch.int32)[None]
    inputs = (ids, places, ones, ids[:, :1], places[:, :1], ones[:, :1])
    with torch.no_grad():
        shares = found.model.logits(inputs).softmax(-1)[0, 0]
    assert output["text"] == "good" == LABELS[int(shares.argmax())]
    assert output["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
