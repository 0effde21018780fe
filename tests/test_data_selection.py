"""Which records are trained on and which are held out: keys and files to hold out, duplicates, length filters."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Storage
from configs.errors import DataError
from configs.load import parse_config
from data.held_out import read_records
from data.prepare import data_digest, prepare
from data.runners import serial
from data.shards import ShardReader
from data.tokenizer import Tokenizer


def make_config(corpora, **data):
    sizes = {"source_tokens": 64, "target_tokens": 64, "shard_rows": 40, "block_rows": 8, "lanes": 2}
    tree = {
        "data": {"corpora": corpora, "tokenizer": {"vocabulary_size": 300}, **sizes, **data},
        "train": {"steps": 5, "global_batch_sequences": 8, "micro_batch_sequences": 2},
    }
    return parse_config(tree, "test")


def section(path, **more):
    return {"name": "c", "kind": "jsonl", "path": str(path), "source": "{q}", "target": "{a}", **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained_pairs(storage, manifest, name="c"):
    """Texts of all pairs in the shards, decoded."""
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    pairs = []
    for shard in manifest.corpus(name).shards:
        reader = ShardReader(storage.local_path(f"{manifest.folder}/{shard.path}"), shard)
        for row in range(shard.rows):
            source, source_lengths, target, target_lengths = reader.row(row)
            sources = np.split(source, np.cumsum(source_lengths)[:-1])
            targets = np.split(target, np.cumsum(target_lengths)[:-1])
            pairs += [(tokenizer.decode(s), tokenizer.decode(t)) for s, t in zip(sources, targets, strict=True)]
    return pairs


def prepared(config, folder, runner=serial):
    storage = Storage(str(folder))
    manifest = prepare(config, storage, runner, lambda line: None)
    held = [(record.source, record.target) for record in read_records(storage, manifest, "c", 10**6, 0)]
    return manifest, trained_pairs(storage, manifest), held


def test_records_that_share_the_held_out_key_stand_on_one_side(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [{"q": f"q{i % 40}", "a": f"answer {i} {number}"} for i in range(120)])
    config = make_config([section(tmp_path, held_out_key="q")], held_out_fraction=0.25)
    manifest, trained, held = prepared(config, tmp_path / "store")
    trained_keys, held_keys = {q for q, _ in trained}, {q for q, _ in held}
    assert not trained_keys & held_keys and 2 <= len(held_keys) <= 20
    assert len(trained) + len(held) == 360 and len(held) == 9 * len(held_keys)
    assert manifest.corpus("c").counts["records held out"] == len(held)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.held_out_key: .*record 1\) have no field 'id'.*: a, q"):
        prepare(make_config([section(tmp_path, held_out_key="id")]), Storage(str(tmp_path / "s")), serial, print)
    text = section(tmp_path, kind="text", source="{path}", target="{text}", held_out_key="id")
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.held_out_key: records of kind 'text' have no field 'id'"):
        data_digest(make_config([text]))


def test_equal_keys_stand_on_one_side_in_corpora_of_different_files_too(tmp_path):
    write(tmp_path / "one.jsonl", [{"q": f"q{i % 60}", "a": f"one {i}"} for i in range(120)])
    write(tmp_path / "two.jsonl", [{"q": f"q{i}", "a": f"two {i}"} for i in range(60)])
    corpora = [section(tmp_path / f"{name}.jsonl", name=name, held_out_key="q") for name in ("one", "two")]
    storage = Storage(str(tmp_path / "store"))
    manifest = prepare(make_config(corpora, held_out_fraction=0.3), storage, serial, lambda line: None)
    held = [{record.source for record in read_records(storage, manifest, name, 10**6, 0)} for name in ("one", "two")]
    trained = [{q for q, _ in trained_pairs(storage, manifest, name)} for name in ("one", "two")]
    assert held[0] == held[1] and trained[0] == trained[1] and not held[0] & trained[0] and 5 < len(held[0]) < 30


def test_held_out_files_of_parallel_text_are_all_and_alone_held_out(tmp_path):
    for split, lines in (("train", 30), ("val", 7)):
        for column in ("en", "de"):
            text = "".join(f"{split} {column} {i}\n" for i in range(lines))
            (tmp_path / f"{split}.{column}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    corpus = section(f"{tmp_path}/train.{{column}}.gz", kind="parallel", columns=["en", "de"], source="{en}")
    corpus = {**corpus, "target": "{de}", "held_out": f"{tmp_path}/val.{{column}}.gz"}
    config = make_config([corpus], held_out_fraction=0.5)
    _, trained, held = prepared(config, tmp_path / "store")
    assert sorted(trained) == sorted((f"train en {i}", f"train de {i}") for i in range(30))
    assert held == [(f"val en {i}", f"val de {i}") for i in range(7)]
    before = data_digest(config)
    (tmp_path / "val.de.gz").write_bytes(gzip.compress(b"other\n" * 7, mtime=0))
    assert data_digest(config) != before


def repeating(number, count):
    """Rows with repetitions inside a file, across files, and of the rows that are held out."""
    return [{"q": f"q{(i * 7 + number) % 50}", "a": f"a{i % 10}", "id": f"{number}-{i}"} for i in range(count)]


def backwards(function, arguments, _done=None):
    return [function(*each) for each in reversed(arguments)][::-1]


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_equal_pairs_one_stays_whatever_the_tasks_and_partitions(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(5):
        write(source / f"{number}.jsonl", repeating(number, 90))
    held_rows = [*repeating(3, 12), {"q": "unseen", "a": "x", "id": "-"}, *repeating(3, 3)]
    write(source / "test.jsonl", held_rows)
    corpus = section(source, held_out=str(source / "test.jsonl"))
    monkeypatch.setattr("data.prepare.LEAST_PART_BYTES", 3000)
    everything = [(row["q"], row["a"]) for number in range(5) for row in repeating(number, 90)]
    held_pairs = list(dict.fromkeys((row["q"], row["a"]) for row in held_rows))
    expected = set(everything) - set(held_pairs)

    config = make_config([corpus], deduplicate=True)
    manifest, trained, held = prepared(config, tmp_path / "one")
    assert sorted(trained) == sorted(expected) and held == held_pairs
    leaked = sum(pair in held_pairs for pair in everything)
    counts = manifest.corpus("c").counts
    assert counts["records equal to one held out"] == leaked > 0
    assert counts["duplicate records"] == len(everything) - leaked - len(expected) > 0
    assert counts["duplicate records held out"] == len(held_rows) - len(held_pairs) > 0
    assert counts["records"] == len(expected) == manifest.corpus("c").pairs

    monkeypatch.setattr("data.duplicates.BYTES_PER_RECORD", 2**30 // 60)
    prepared(config, tmp_path / "many", backwards)
    assert files_below(tmp_path / "one") == files_below(tmp_path / "many")

    plain, trained, held = prepared(make_config([corpus]), tmp_path / "plain")
    assert sorted(trained) == sorted(everything) and len(held) == len(held_rows)
    assert "duplicate records" not in plain.corpus("c").counts and plain.digest != manifest.digest


def test_a_killed_removal_of_duplicates_goes_on(tmp_path):
    write(tmp_path / "a.jsonl", repeating(0, 300))
    config = make_config([section(tmp_path / "a.jsonl")], deduplicate=True, held_out_fraction=0.1)
    prepared(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def dies_at(name):
        def run(function, arguments, _done=None):
            results = serial(function, arguments)
            if function.__name__ == name:
                raise Killed
            return results

        return run

    for name in ("write_hashes", "find_duplicates", "train_tokenizer", "encode"):
        with pytest.raises(Killed):
            prepared(config, tmp_path / "killed", dies_at(name))
    prepared(config, tmp_path / "killed")
    assert files_below(tmp_path / "whole") == files_below(tmp_path / "killed")


def test_lengths_outside_the_limits_are_left_out_and_counted(tmp_path):
    rows = [{"q": "x" * s, "a": "y" * t} for s in range(1, 9) for t in range(1, 9)]
    write(tmp_path / "a.jsonl", rows)
    corpus = section(tmp_path / "a.jsonl", source_characters=[2, 6], target_characters=[3, 100])
    manifest, trained, held = prepared(make_config([corpus], held_out_fraction=0.2), tmp_path / "store")
    kept = sorted(trained + held)
    assert kept == sorted((row["q"], row["a"]) for row in rows if 2 <= len(row["q"]) <= 6 and len(row["a"]) >= 3)
    counts = manifest.corpus("c").counts
    assert counts["records with a source that is too short"] == 8
    assert counts["records with a source that is too long"] == 16
    assert counts["records with a target that is too short"] == 10
    assert "records with a target that is too long" not in counts
    assert counts["records"] + counts["records held out"] + 8 + 16 + 10 == 64


def test_a_continuation_is_measured_before_it_is_cut(tmp_path):
    write(tmp_path / "a.jsonl", [{"a": "word " * n + "end"} for n in range(1, 20)])
    corpus = section(tmp_path / "a.jsonl", continuation=True, target_characters=[18, 53])
    del corpus["source"]
    _, trained, _ = prepared(make_config([corpus], held_out_fraction=0.0), tmp_path / "store")
    assert sorted(len(source + target) for source, target in trained) == [5 * n + 3 for n in range(3, 11)]


def test_a_corpus_that_only_repeats_what_is_held_out_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}] * 3)
    write(tmp_path / "b.jsonl", [{"q": "x", "a": "y"}])
    corpus = section(tmp_path / "a.jsonl", held_out=str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: all 1 usable records .*equal to one that is"):
        prepared(make_config([corpus], deduplicate=True), tmp_path / "store")
    assert not Path(tmp_path / "store/data").exists() or not list(Path(tmp_path / "store/data").iterdir())
