"""Data that can be prepared but not trained is refused before a run starts."""

import sys

import pytest
import yaml

from configs.errors import ConfigError
from configs.load import load_config
from jobs.commands import submitting
from jobs.trainable import check_trainable

REFUSAL = r"data\.layout: .*encoder_decoder; set data\.layout to pairs"


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Some words of prose.\n\n" * 50)
    corpus = {"name": "a", "kind": "text", "path": "a.txt", "target": "{text}", "continuation": True}
    tree = {
        "run": {"name": "decoder", "storage": str(tmp_path / "runs")},
        "data": {"corpora": [corpus], "layout": "sequence", "packing": "chunk", "tokenizer": {"vocabulary_size": 300}},
        "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


class Reached(Exception):
    pass


@pytest.mark.parametrize("stage", [None, "train"])
def test_submitting_refuses_and_leaves_nothing(file, stage):
    with pytest.raises(ConfigError, match=REFUSAL):
        submitting.submit(submitting.Request(str(file), embedded=True, stage=stage), print)
    assert not (file.parent / "runs").exists()


def test_preparing_goes_on(file, monkeypatch):
    def reached(storage):
        raise Reached

    monkeypatch.setattr(submitting, "probe_storage", reached)
    with pytest.raises(Reached):
        submitting.submit(submitting.Request(str(file), embedded=True, stage="prepare"), print)


def test_plain_processes_refuse_before_they_prepare(file, monkeypatch):
    from jobs import train_local

    monkeypatch.setattr(sys, "argv", ["train_local", str(file)])
    with pytest.raises(ConfigError, match=REFUSAL):
        train_local.main()
    assert not (file.parent / "runs").exists()


def test_pairs_are_trainable(file):
    check_trainable(load_config(file, ["data.layout=pairs", "data.packing=none"]))
