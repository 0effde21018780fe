"""Preparation in a process of its own: killed at any point, bounded in memory, heard of while it goes on."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from cluster.storage import Storage
from configs.load import parse_config, to_yaml
from data.manifest import Manifest
from data.prepare import prepare
from data.runners import Progress, serial
from tests.test_layout import ROOT

PROGRAM = """
import sys, resource
from cluster.storage import Storage
from configs.load import load_config
from data.prepare import prepare
from data.runners import serial
config = load_config(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = prepare(config, Storage(config.run.storage), serial, lambda line: None)
print(manifest.folder, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_config(folder, path, storage, **data):
    tree = {
        "run": {"storage": str(storage)},
        "data": {
            "corpora": [{"name": "c", "kind": "jsonl", "path": str(path), "source": "{q}", "target": "{a}"}],
            "tokenizer": {"vocabulary_size": 300, "sample_bytes": 20_000},
            "source_tokens": 32,
            "target_tokens": 32,
            "shard_rows": 64,
            "block_rows": 16,
            **data,
        },
        "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
    }
    config = parse_config(tree, "test")
    file = folder / f"{storage.name}.yaml"
    file.write_text(to_yaml(config))
    return config, file


def start(file):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=None
    )


def write_records(path, count, words):
    source = random.Random(5)
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(source.choice(("red", "green", "blue", "cat", "dog", "tree")) for _ in range(words))
            file.write(json.dumps({"q": f"{number} {text}", "a": text[::-1]}) + "\n")


def tree_of(storage, folder):
    root = storage.local_path(folder)
    from pathlib import Path

    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def shard_files(storage):
    from pathlib import Path

    return sorted(Path(storage.local_path()).rglob("shards/*/*.arrow"))


def test_a_preparation_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    write_records(tmp_path / "in.jsonl", 3000, 12)
    config, _ = write_config(tmp_path, tmp_path / "in.jsonl", tmp_path / "whole")
    whole = Storage(str(tmp_path / "whole"))
    manifest = prepare(config, whole, serial, lambda line: None)
    count = len(shard_files(whole))
    assert count >= 10
    _, file = write_config(tmp_path, tmp_path / "in.jsonl", tmp_path / "killed")
    killed, kills = Storage(str(tmp_path / "killed")), 0
    # Killed as soon as so many shards are there, then once more at an arbitrary moment of the start.
    for wanted in (1, count // 2):
        process = start(file)
        deadline = time.monotonic() + 60
        while len(shard_files(killed)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 1
    last = start(file)
    assert last.communicate()[0].split()[0] == manifest.folder and last.returncode == 0
    assert tree_of(killed, manifest.folder) == tree_of(whole, manifest.folder)


def test_finished_shards_are_kept_and_orphans_removed(tmp_path):
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        write_records(tmp_path / "in" / f"{name}.jsonl", 300, 8)
    config, _ = write_config(tmp_path, tmp_path / "in", tmp_path / "store", held_out_fraction=0.0)
    storage = Storage(str(tmp_path / "store"))
    manifest = prepare(config, storage, serial, lambda line: None)
    assert Manifest.read(storage, manifest.folder).digest == manifest.digest

    class Killed(Exception):
        pass

    def dies_at_the_end(function, arguments, done=None):
        results = serial(function, arguments)
        if function.__name__ == "encode":
            raise Killed
        return results

    storage.remove(manifest.folder)
    with pytest.raises(Killed):
        prepare(config, storage, dies_at_the_end, lambda line: None)
    before = {path: path.stat().st_ino for path in shard_files(storage)}
    storage.write_bytes(f"{manifest.folder}/shards/c/.tmp-left-behind", b"half a shard")
    prepare(config, storage, serial, lambda line: None)
    assert before and {path: path.stat().st_ino for path in shard_files(storage)} == before
    assert not [name for name in storage.names(f"{manifest.folder}/shards/c") if "left-behind" in name]


@pytest.mark.slow
def test_memory_is_bounded_on_inputs_larger_than_it(tmp_path):
    """Peak growth of the whole preparation in one process, for inputs of 16 and 160 MB."""
    grown = {}
    for name, count in (("small", 20_000), ("large", 200_000)):
        write_records(tmp_path / f"{name}.jsonl", count, 80)
        options = {
            "deduplicate": True,
            "prepare_memory_bytes": 64 * 2**20,
            "held_out_fraction": 0.3,
            "shard_rows": 4096,
            "source_tokens": 256,
            "target_tokens": 256,
        }
        _, file = write_config(tmp_path, tmp_path / f"{name}.jsonl", tmp_path / f"store-{name}", **options)
        process = start(file)
        text = process.communicate()[0]
        assert process.returncode == 0
        grown[name] = int(text.split()[1]) * 1024
    assert (tmp_path / "large.jsonl").stat().st_size > 150e6
    print(grown)
    # Ten times the input may not take more than the bound beyond what the small one takes.
    assert grown["large"] - grown["small"] < 64 * 2**20


def test_progress_is_told_at_intervals_with_counts_and_rates():
    lines, now = [], [0.0]
    progress = Progress("read", [1_000_000] * 4, lines.append, clock=lambda: now[0])
    for number, moment in enumerate((1.0, 6.0, 7.0, 8.0)):
        now[0] = moment
        progress(number)
    assert lines == ["read 2/4 parts, 2.0 MB, 0.3 MB/s", "read 4/4 parts, 4.0 MB, 0.5 MB/s"]
    quick = Progress("read", [1], lines.append, clock=lambda: 0.0)
    quick(0)
    assert len(lines) == 2
