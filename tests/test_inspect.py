"""`telar inspect`: its numbers against counts made another way, its samples against what the loader serves."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Storage
from configs.errors import ConfigError, DataError
from configs.load import load_config
from data.inspect_data import MEASURED_SHARDS, describe, samples, text_parts
from data.manifest import Manifest
from data.mixture import make_order
from data.prepare import prepare
from data.reader import SampleReader
from data.runners import serial
from data.tokenizer import read_tokenizer
from jobs.commands.inspect_text import as_text, printable, short
from jobs.commands.inspecting import inspect
from jobs.commands.paths import with_absolute_paths

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 30, 8


def write_project(folder, **data):
    for name, count in (("letters", 260), ("numbers", 90)):
        rows = [{"q": f"{name} {i}?", "a": f"answer {i} " + "x" * (i % 70)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = [
        {"name": name, "kind": "jsonl", "path": f"{name}.jsonl", "source": "{q}", "target": "{a}", "weight": weight}
        for name, weight in (("letters", 3), ("numbers", 1))
    ]
    sizes = {"source_tokens": 48, "target_tokens": 48, "shard_rows": 40, "block_rows": 8, "lanes": 2}
    tree = {
        "data": {"corpora": corpora, "tokenizer": {"vocabulary_size": 300}, **sizes, **data},
        "train": {"steps": STEPS, "global_batch_sequences": BATCH, "micro_batch_sequences": 2},
        "model": {"architecture": "decoder"} if data.get("layout") == "sequence" else {},
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def prepared(folder, **data):
    file = write_project(folder, **data)
    config = with_absolute_paths(load_config(file), str(file), check=True)
    manifest = prepare(config, Storage(str(folder / "runs")), serial, lambda line: None)
    return file, config, manifest


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    return folder, *prepared(folder)


def opener(folder, manifest):
    return lambda shard: str(folder / "runs" / manifest.folder / shard.path)


def rows_of(folder, manifest, name):
    """Rows of a corpus as plain lists, read with Arrow alone."""
    rows = []
    for shard in manifest.corpus(name).shards:
        with pa.ipc.open_file(str(folder / "runs" / manifest.folder / shard.path)) as file:
            rows += file.read_all().to_pylist()
    return rows


def test_numbers_are_those_of_the_shards(project):
    folder, file, _, manifest = project
    found = inspect(str(file), str(folder / "runs"), (), None, 1)
    assert json.loads(json.dumps(found)) == found
    for corpus in found["corpora"]:
        rows = rows_of(folder, manifest, corpus["name"])
        lengths = {side: [n for row in rows for n in row[f"{side}_lengths"]] for side in ("source", "target")}
        assert (corpus["rows"], corpus["pairs"]) == (len(rows), len(lengths["target"]))
        for side in ("source", "target"):
            assert corpus[f"{side}_tokens"] == sum(lengths[side])
            assert corpus[f"{side}_fill"] == pytest.approx(sum(lengths[side]) / len(rows) / 48)
            bins = corpus["lengths"]["bins"]
            assert [each[side] for each in bins] == [
                sum(each["least"] <= n <= each["most"] for n in lengths[side]) for each in bins
            ]
            assert corpus["lengths"][side]["median"] in (sorted(lengths[side])[len(lengths[side]) // 2 - 1 :][:2])
        assert corpus["lengths"]["pairs"] == corpus["pairs"]
        assert corpus["counts"] == manifest.corpus(corpus["name"]).counts
    assert found["tokenizer"]["special_tokens"] == ["<pad>", "<bos>", "<eos>"]
    assert found["tokenizer"]["kind"] == "BPE" and found["positions"] == STEPS * BATCH


def test_the_mixture_is_what_the_order_gives(tmp_path):
    changes = [{"from_step": 11, "weights": {"numbers": 9}}, {"from_step": 20, "weights": {"letters": 0.5}}]
    file, config, manifest = prepared(tmp_path, weight_changes=changes)
    found = inspect(str(file), str(tmp_path / "runs"), (), None, 1)
    mixture = found["mixture"]
    corpora, _, _ = make_order(manifest, config)(np.arange(STEPS * BATCH))
    for number, corpus in enumerate(manifest.corpora):
        # Off by less than a superblock of the last segment.
        drawn = np.count_nonzero(corpora == number)
        assert abs(mixture["epochs"][number] * corpus.rows - drawn) <= mixture["segments"][-1]["superblock"]
    assert [segment["weights"] for segment in mixture["segments"]] == [[3, 1], [3, 9], [0.5, 9]]
    for segment, until in zip(mixture["segments"], [88, 160, None], strict=True):
        first = segment["first_position"]
        assert first == 0 or first >= segment["from_step"] * BATCH
        block = corpora[first : first + segment["superblock"]]
        assert until is None or first + segment["superblock"] <= until + segment["superblock"]
        assert (np.bincount(block, minlength=2) == np.array(segment["slots"]) * 2).all()


def test_a_whole_epoch_of_samples_gives_every_record_once(project):
    folder, _, config, manifest = project
    tokenizer = read_tokenizer(Storage(str(folder / "runs")), manifest)
    found = samples(manifest, config, opener(folder, manifest), tokenizer, 0, 400)
    texts = Counter()
    for sample in found:
        if sample["corpus"] == "numbers" and sample["epoch"] == 0:
            for pair in sample["pairs"]:
                assert pair["source"]["parts"] == [[pair["source"]["parts"][0][0], False]]
                assert pair["ended"] == (pair["target"]["parts"][-1] == ["<eos>", True])
                texts["".join(text for text, special in pair["target"]["parts"] if not special)] += 1
    held_out = manifest.corpus("numbers").held_out.rows
    assert sum(texts.values()) == manifest.corpus("numbers").pairs and held_out > 0
    assert sum(manifest.corpus(name).rows for name in ("letters", "numbers")) < 400


@pytest.mark.parametrize("data", [{}, {"packing": "none", "bucket_batches": 4}, {"layout": "sequence"}])
def test_samples_are_those_that_training_reads(tmp_path, data):
    file, config, manifest = prepared(tmp_path, **data)
    found = inspect(str(file), str(tmp_path / "runs"), (), 37, 20)["samples"]
    reader = SampleReader(manifest, config, opener(tmp_path, manifest))
    served = reader.read(reader.positions(np.arange(37, 57)))
    ids = {
        side: [n for each in found for pair in each["pairs"] for n in pair[side]["ids"]]
        for side in ("source", "target")
    }
    assert ids["source"] == served.source.tolist() and ids["target"] == served.target.tolist()
    assert [len(each["pairs"]) for each in found] == served.pairs.tolist()
    rows = {name: rows_of(tmp_path, manifest, name) for name in ("letters", "numbers")}
    for number, each in enumerate(found):
        assert each["position"] == 37 + number
        row = rows[each["corpus"]][each["row"]]
        assert row["target"] == [n for pair in each["pairs"] for n in pair["target"]["ids"]]
        assert (each["source_tokens"], each["target_tokens"]) == (len(row["source"]), len(row["target"]))
    assert ("bucket_batches" in data) == any(each["order_position"] != each["position"] for each in found)
    text = as_text(inspect(str(file), str(tmp_path / "runs"), (), 37, 20), None)
    assert ("source, no loss | " in text) == (data.get("layout") == "sequence") and "<eos>" in text


def test_positions_far_past_the_run_are_found_at_once(project):
    folder, file, _, _ = project
    found = inspect(str(file), str(folder / "runs"), (), 2**50, 1)
    (sample,) = found["samples"]
    assert sample["epoch"] > 2**40
    assert f"after the run's end at {STEPS * BATCH}" in as_text(found, 80)


def test_lengths_are_counted_in_a_bounded_number_of_shards_and_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("data.inspect_data.MEASURED_ROWS", 64)
    _, config, manifest = prepared(tmp_path, shard_rows=4, block_rows=2, packing="none")
    opened = Counter()

    def open_shard(shard):
        opened[shard.path] += 1
        return opener(tmp_path, manifest)(shard)

    tokenizer = read_tokenizer(Storage(str(tmp_path / "runs")), manifest)
    found = describe(manifest, config, open_shard, tokenizer)["corpora"]
    assert len(opened) == len(found) * MEASURED_SHARDS and set(opened.values()) == {1}
    for corpus in found:
        assert corpus["shards"] > MEASURED_SHARDS == corpus["lengths"]["shards"]
        assert 56 < corpus["lengths"]["rows"] == sum(each["source"] for each in corpus["lengths"]["bins"]) <= 64
    result = {**inspect(str(tmp_path / "small.yaml"), str(tmp_path / "runs"), (), None, 1), "corpora": found}
    first, looked = found[0], found[0]["lengths"]["pairs"]
    said = f"{looked} of {first['pairs']:,} pairs looked at, in 16 of {first['shards']:,} shards"
    assert said in as_text(result, 120)


def test_a_run_a_manifest_and_a_configuration_name_the_same_data(project, monkeypatch):
    folder, file, config, manifest = project
    storage = folder / "runs"
    run = storage / "a-run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    with pytest.raises(DataError, match=r"run a-run has no prepared data yet; .*--stage prepare"):
        inspect("a-run", str(storage), (), None, 1)
    (run / "manifest.json").write_text(json.dumps({"data": manifest.folder}))
    of_config = inspect(str(file), str(storage), (), 5, 3)
    assert inspect("a-run", str(storage), (), 5, 3) == of_config == inspect(str(run), None, (), 5, 3)
    assert inspect(f"{run}/manifest.json", None, (), 5, 3) == of_config
    order = ("--set", "data.lanes=2", "data.block_rows=8")[1:]
    for name in ("", "/", "/manifest.json"):
        of_manifest = inspect(f"{storage}/{manifest.folder}{name}", None, order, 5, 3)
        assert of_manifest["samples"] == of_config["samples"] and "a manifest has no run" in of_manifest["note"]
    monkeypatch.chdir(storage / manifest.folder)
    assert inspect("manifest.json", None, (), None, 1)["digest"] == manifest.digest
    with pytest.raises(ConfigError, match="--set: the configuration of a run is fixed"):
        inspect("a-run", str(storage), ("run.seed=3",), None, 1)
    with pytest.raises(ConfigError, match="no run 'b-run'"):
        inspect("b-run", str(storage), (), None, 1)


def test_data_in_another_storage_is_copied_for_the_time_of_the_look(project):
    folder, file, _, manifest = project
    memory = fsspec.filesystem("memory")
    source = folder / "runs" / manifest.folder
    for path in source.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/inspect-test/{manifest.folder}/{path.relative_to(source)}", path.read_bytes())
    try:
        here, there = (inspect(str(file), url, (), 3, 9) for url in (str(folder / "runs"), "memory://inspect-test"))
        assert here["samples"] == there["samples"]
        path = f"/inspect-test/{manifest.folder}/{here['samples'][0]['shard']}"
        content = bytearray(memory.cat_file(path))
        content[len(content) // 2] ^= 1
        memory.pipe_file(path, bytes(content))
        with pytest.raises(DataError, match=here["samples"][0]["shard"]):
            inspect(str(file), "memory://inspect-test", (), 0, 300)
        memory.rm(path)
        with pytest.raises(DataError, match=f"{here['samples'][0]['shard']} does not exist; run the prepare stage"):
            inspect(str(file), "memory://inspect-test", (), 3, 1)
    finally:
        memory.rm("/inspect-test", recursive=True)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_lines_fit_the_terminal_and_are_plain_without_one(project, width):
    folder, file, _, _ = project
    for at in (None, 5):
        result = inspect(str(file), str(folder / "runs"), (), at, 4)
        lines = as_text(result, width).split("\n")
        assert "\x1b[" in "".join(lines)
        shown = [_without_colours(line) for line in lines]
        # A path without blanks may be longer than a narrow line.
        assert all(len(line) <= width for line in shown), max(shown, key=len)
        plain = as_text(result, None, unicode_bars=False)
        assert "\x1b" not in plain and plain.isascii()


def _without_colours(line):
    while "\x1b[" in line:
        head, _, rest = line.partition("\x1b[")
        line = head + rest.partition("m")[2]
    return line


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_cannot_command_the_terminal(text):
    shown = printable(text)
    assert not [each for each in shown if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    assert printable("\x1b[2J\r\x9b\u202e") == r"\x1b[2J\r\x9b\u202e" and printable("a\tb\nc é 語") == "a\tb\nc é 語"


@settings(deadline=None)
@given(st.integers(0, 10**18))
def test_counts_are_short_and_right_to_three_digits(number):
    text = short(number)
    assert len(text) <= 6
    value, _, unit = text.replace(",", "").partition(" ")
    assert float(value) * 1000 ** " kMGTPE".index(unit or " ") == pytest.approx(number, rel=0.005001)


def test_long_runs_of_special_tokens_are_counted(project):
    folder, _, _, manifest = project
    tokenizer = read_tokenizer(Storage(str(folder / "runs")), manifest)
    special = {0: "<pad>", 1: "<bos>", 2: "<eos>", 9: "<i9>"}
    hello = tokenizer.encode("hello")
    assert text_parts([1, *hello, 2, 0], tokenizer, special) == [
        ("<bos>", True),
        ("hello", False),
        ("<eos><pad>", True),
    ]
    assert text_parts([9] * 64, tokenizer, special) == [("<i9>" * 4 + " ... 56 more ... " + "<i9>" * 4, True)]


def test_the_command_needs_neither_ray_nor_torch_and_says_what_to_prepare(tmp_path):
    file = write_project(tmp_path)
    code = "import sys; from jobs.cli import cli; cli(sys.argv[1:], standalone_mode=False)"
    check = "; print('LOADED', sorted({'ray', 'torch', 'deepspeed'} & set(sys.modules)), file=sys.stderr)"

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code + check, "inspect", str(file), "--storage", str(tmp_path / "runs"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )

    unprepared = run("--set", "data.lanes=4")
    assert unprepared.returncode != 0
    assert f"telar prepare {file} --set data.lanes=4 --storage {tmp_path}/runs" in unprepared.stderr
    prepared(tmp_path)
    shown = run()
    assert shown.returncode == 0 and "LOADED []" in shown.stderr and "letters: tokens of a pair" in shown.stdout
    sample = run("--at", "1000000", "--samples", "2", "--json")
    assert [each["position"] for each in json.loads(sample.stdout)["samples"]] == [1_000_000, 1_000_001]
    assert "LOADED []" in sample.stderr


def test_a_manifest_of_sequences_is_described(tmp_path):
    _, _, manifest = prepared(tmp_path, layout="sequence", packing="chunk")
    found = inspect(f"{tmp_path}/runs/{manifest.folder}", None, (), None, 1)
    assert isinstance(Manifest.read(Storage(str(tmp_path / "runs")), manifest.folder), Manifest)
    for corpus in found["corpora"]:
        assert corpus["source_fill"] is None
        assert corpus["target_fill"] == pytest.approx(
            (corpus["source_tokens"] + corpus["target_tokens"]) / corpus["rows"] / 48
        )
    assert "layout     sequence, packing chunk, 48 positions to a sample" in as_text(found, None)
