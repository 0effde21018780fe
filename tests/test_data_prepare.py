"""Preparation: tokenizer, packing, shards, held-out records and the manifest that binds them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Storage
from configs.errors import DataError
from configs.load import parse_config
from data.held_out import held_out_files, read_records, share_of
from data.manifest import Manifest
from data.prepare import data_digest, prepare
from data.runners import serial
from data.shards import ShardReader, file_digest
from data.tokenizer import Tokenizer, read_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("load", "save", "merge", "split", "count", "parse")


def body_of(verb, number):
    checks = "    check(result)\n" * number if verb == "save" else ""
    loop = f"    for item in items[:limit]:\n        result.append({verb}(item, {number}))\n"
    return f"    result = []\n{loop}{checks}    return result"


def write_code(folder, files=12):
    folder.mkdir(exist_ok=True)
    for number in range(files):
        functions = [
            f'def {verb}_{number}(items, limit={number}):\n    """{verb.title()} the first {number} items given.\n\n'
            f'    The order of items is kept, {verb} by {verb}.\n    """\n{body_of(verb, number)}\n'
            for verb in VERBS
        ]
        (folder / f"module_{number}.py").write_text("\n\n".join(functions))


def make_config(path, **data):
    tree = {
        "data": {
            "corpora": [
                {
                    "name": "code",
                    "kind": "python",
                    "path": str(path),
                    "source": "complete: {context}{signature}",
                    "target": "{body}",
                    "weight": 2.0,
                    "task": "completion",
                },
                {"name": "prose", "kind": "python", "path": str(path), "target": "{text}", "continuation": True},
            ],
            "tokenizer": {"vocabulary_size": 350},
            "source_tokens": 48,
            "target_tokens": 24,
            "held_out_fraction": 0.2,
            "shard_rows": 40,
            "block_rows": 8,
            "lanes": 2,
            "window_blocks": 2,
            **data,
        },
        "train": {"steps": 5, "global_batch_sequences": 8, "micro_batch_sequences": 2},
    }
    return parse_config(tree, "test")


@pytest.fixture
def code(tmp_path):
    write_code(tmp_path / "code")
    return tmp_path / "code"


def files_below(storage):
    root = Path(storage.local_path())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def decoded_pairs(storage, manifest, name):
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    for shard in manifest.corpus(name).shards:
        reader = ShardReader(storage.local_path(f"{manifest.folder}/{shard.path}"), shard)
        for row in range(shard.rows):
            source, source_lengths, target, target_lengths = reader.row(row)
            assert len(source) <= manifest.source_capacity and len(target) <= manifest.target_capacity
            sources = np.split(source, np.cumsum(source_lengths)[:-1])
            targets = np.split(target, np.cumsum(target_lengths)[:-1])
            for one, other in zip(sources, targets, strict=True):
                ended = other[-1] == tokenizer.eos_id
                yield tokenizer.decode(one), tokenizer.decode(other[:-1] if ended else other), ended


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([Path(__file__).read_text(), (ROOT / "data/order.py").read_text()], 500)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=80) | st.text(alphabet="if x:\n\t 0_<pad>", max_size=80))
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < token < tokenizer.vocabulary_size for token in ids)


def test_special_tokens_never_come_from_text_and_layout_is_cheap(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert min(tokenizer.encode("<eos><pad><bos>")) > 2
    assert len(tokenizer.encode("\n        ")) == 1
    assert len(tokenizer.encode("2048")) == 4
    assert Tokenizer.load(tokenizer.to_bytes()).digest == tokenizer.digest


def test_training_does_not_depend_on_the_process(tmp_path):
    script = (
        "import sys; from data.tokenizer import Tokenizer; text = open('data/prepare.py').read();"
        "print(Tokenizer.train(text.splitlines(True) * 3, 700).digest)"
    )
    digests = set()
    for threads in ("1", "4"):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PATH": "/usr/bin"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, code):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: .*no tokenizer\.json"):
        data_digest(make_config(code, tokenizer={"path": str(tmp_path / "t.json")}))
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: .*nowhere"):
        data_digest(make_config(code, tokenizer={"path": str(tmp_path / "nowhere.json")}))


# Preparation as a whole


def test_prepared_shards_hold_every_training_text(tmp_path, code):
    config = make_config(code, source_tokens=600, target_tokens=600)
    storage, lines = Storage(str(tmp_path / "store")), []
    manifest = prepare(config, storage, serial, lines.append)
    assert lines and manifest.folder == f"data/{data_digest(config)}"
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    assert tokenizer.digest == manifest.tokenizer_digest and tokenizer.vocabulary_size == manifest.vocabulary_size
    held = {record.fields["path"] for record in read_records(storage, manifest, "code", 10**6, 0)}
    train = {file.name for file in code.iterdir()} - held
    assert held and train
    numbers = [int(name.removesuffix(".py").split("_")[1]) for name in train]
    pairs = list(decoded_pairs(storage, manifest, "code"))
    assert all(ended for _, _, ended in pairs)
    assert sorted(target for _, target, _ in pairs) == sorted(body_of(v, n) for v in VERBS for n in numbers)
    for source, target, _ in pairs:
        verb, number = target.split("append(")[1].split("(")[0], target.split("item, ")[1].split(")")[0]
        assert source.endswith(f"def {verb}_{number}(items, limit={number}):")
    assert manifest.corpus("code").counts["records"] == manifest.corpus("code").pairs == len(pairs)
    prose = [source + target for source, target, _ in decoded_pairs(storage, manifest, "prose")]
    assert sorted(prose) == sorted(
        f"{v.title()} the first {n} items given.\n\nThe order of items is kept, {v} by {v}."
        for v in VERBS
        for n in numbers
    )
    for file in manifest.files():
        path = storage.local_path(f"{manifest.folder}/{file.path}")
        assert file_digest(path) == file.digest and Path(path).stat().st_size == file.bytes
    assert not storage.exists(f"{manifest.folder}/work")
    assert set(storage.names(manifest.folder)) == {
        *("held_out", "manifest.json", "shards", "shards.arrow", "tokenizer.json")
    }


def test_both_corpora_hold_out_the_same_files_and_records_keep_their_fields(tmp_path, code):
    storage = Storage(str(tmp_path / "store"))
    manifest = prepare(make_config(code), storage, serial, lambda line: None)
    one, other = (read_records(storage, manifest, name, 10**6, 0) for name in ("code", "prose"))
    assert {record.fields["path"] for record in one} == {record.fields["path"] for record in other}
    for record in one:
        assert record.target == record.fields["body"] and record.source.endswith(record.fields["signature"])
        compile(record.fields["signature"] + "\n" + record.fields["body"], "x", "exec")
    few = read_records(storage, manifest, "code", 4, 0)
    assert len(few) == 4 and all(record in one for record in few)
    assert few == read_records(storage, manifest, "code", 4, 0) != read_records(storage, manifest, "code", 4, 1)
    assert [record.index for record in few] == sorted(record.index for record in few)


def backwards(function, arguments, _done=None):
    """A runner that finishes tasks in the opposite order."""
    return [function(*each) for each in reversed(arguments)][::-1]


def test_bytes_do_not_depend_on_the_runner_or_the_folder(tmp_path, code, monkeypatch):
    monkeypatch.setattr("data.prepare.LEAST_PART_BYTES", 2000)
    config = make_config(code)
    stores = [Storage(str(tmp_path / name)) for name in ("a", "b")]
    for storage, runner in zip(stores, (serial, backwards), strict=True):
        manifest = prepare(config, storage, runner, lambda line: None)
        assert len(manifest.corpus("code").shards) > 2
    assert files_below(stores[0]) == files_below(stores[1])


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(tmp_path, code, monkeypatch):
    monkeypatch.setattr("data.prepare.LEAST_PART_BYTES", 2000)
    config, whole, killed = make_config(code), Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    prepare(config, whole, serial, lambda line: None)
    calls = []

    class Killed(Exception):
        pass

    def dies_after(limit):
        def run(function, arguments, _done=None):
            results = []
            for each in arguments:
                if len(calls) >= limit:
                    raise Killed
                results.append(function(*each))
                calls.append(function.__name__)
            return results

        return run

    for limit in (3, 9, 14):
        with pytest.raises(Killed):
            prepare(config, killed, dies_after(limit), lambda line: None)
    prepare(config, killed, serial, lambda line: None)
    assert files_below(whole) == files_below(killed)


def test_prepared_data_is_found_and_a_missing_shard_is_made_again(tmp_path, code):
    config, storage = make_config(code), Storage(str(tmp_path / "store"))
    first = prepare(config, storage, serial, lambda line: None)
    before = files_below(storage)

    def never(function, arguments, _done=None):
        raise AssertionError("nothing was to be done")

    lines = []
    assert prepare(config, storage, never, lines.append) == first and lines == []
    storage.remove(f"{first.folder}/{first.corpus('code').shards[0].path}")
    assert prepare(config, storage, serial, lines.append) == first and lines
    assert files_below(storage) == before


def test_the_digest_follows_what_data_is_and_nothing_else(code):
    base = data_digest(make_config(code))
    assert data_digest(make_config(code, cache_bytes=12345, prepare_tasks=7, lanes=5)) == base
    assert data_digest(make_config(code, source_tokens=52)) != base
    (code / "module_0.py").write_text("x = 1\n")
    assert data_digest(make_config(code)) != base


def test_a_given_tokenizer_is_used(tmp_path, code):
    inner = Tokenizer.train(["some other text"], 300)
    (tmp_path / "t.json").write_bytes(inner.to_bytes())
    config = make_config(code, tokenizer={"path": str(tmp_path / "t.json")})
    assert prepare(config, Storage(str(tmp_path / "s")), serial, lambda line: None).tokenizer_digest == inner.digest


def test_a_single_file_is_split_by_content_and_equal_records_never_straddle(tmp_path):
    rows = [{"q": f"what is {i % 50} plus one", "a": f"it is {i % 50 + 1} of course"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"name": "qa", "kind": "jsonl", "path": str(tmp_path / "a.jsonl"), "source": "{q}", "target": "{a}"}
    storage = Storage("memory://prepare-test")
    try:
        manifest = prepare(make_config(tmp_path, corpora=[section]), storage, serial, lambda line: None)
        held = [record.target for record in read_records(storage, manifest, "qa", 10**6, 0)]
        assert 0 < len(held) < 100 and all(held.count(target) == 4 for target in held)
        assert manifest.corpus("qa").counts["records"] == 200 - len(held)
    finally:
        storage.remove()


def test_input_without_a_record_and_lacking_fields_are_named(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    storage = Storage(str(tmp_path / "store"))
    with pytest.raises(DataError, match=r"data\.corpora\[code\]\.path: .* gives no record of kind 'python'"):
        prepare(make_config(tmp_path / "a.py"), storage, serial, lambda line: None)
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "y"}\n')
    section = {"name": "qa", "kind": "jsonl", "path": str(tmp_path / "a.jsonl"), "source": "{q}", "target": "{answer}"}
    with pytest.raises(DataError, match=r"data\.corpora\[qa\]\.target: .*\{answer\}.*record 1.*fields there: a, q"):
        prepare(make_config(tmp_path, corpora=[section]), storage, serial, lambda line: None)


@settings(deadline=None, max_examples=50)
@given(names=st.sets(st.text(min_size=1, max_size=5), max_size=60), fraction=st.floats(0, 0.99))
def test_some_file_is_held_out_and_some_is_not(names, fraction):
    held = held_out_files(sorted(names), fraction)
    assert held <= names
    if len(names) > 1 and fraction > 0:
        assert 0 < len(held) < len(names)
    for name in names - held:
        assert share_of(name) >= fraction or len(held) == len(names) - 1 or len(names) == 1


def test_the_file_that_is_most_of_the_text_is_trained_on():
    for name in "abcdefgh":
        assert held_out_files([name, "x"], 0.5, [1000, 10]) == {"x"}
    assert len(held_out_files(["a", "b"], 0.5, [10, 10])) == 1


def test_a_damaged_manifest_or_held_out_file_is_refused(tmp_path, code):
    storage = Storage(str(tmp_path / "store"))
    manifest = prepare(make_config(code), storage, serial, lambda line: None)
    assert manifest == Manifest.read(storage, manifest.folder)
    held = f"{manifest.folder}/{manifest.corpus('code').held_out.path}"
    content = bytearray(storage.read_bytes(held))
    content[len(content) // 2] ^= 1
    storage.write_bytes(held, bytes(content))
    with pytest.raises(DataError, match=r"held_out/code\.parquet: content does not match its digest"):
        read_records(storage, manifest, "code", 3, 0)
    assert read_tokenizer(storage, manifest).encode("return") == Tokenizer.load(
        storage.read_bytes(manifest.tokenizer_path)
    ).encode("return")
    storage.write_bytes(manifest.tokenizer_path, Tokenizer.train(["something else"], 300).to_bytes())
    with pytest.raises(DataError, match="is not the tokenizer of its manifest"):
        read_tokenizer(storage, manifest)
    path = f"{manifest.folder}/manifest.json"
    storage.write_text(path, storage.read_text(path).replace('"pairs": ', '"pairs": 1'))
    with pytest.raises(DataError, match="does not match its digest"):
        Manifest.read(storage, manifest.folder)
    with pytest.raises(DataError, match="prepare stage again"):
        Manifest.read(storage, "data/none")


def test_a_prefix_of_the_templates_is_one_token_in_every_source(tmp_path, code):
    config = make_config(code)
    corpus = config.data.corpora[0]
    prefix = corpus.source[: corpus.source.index("{")]
    assert prefix
    tree = config.model_dump(mode="json")
    tree["data"]["tokenizer"]["prefixes"] = [prefix]
    config = parse_config(tree, "test")
    storage = Storage(str(tmp_path / "store"))
    manifest = prepare(config, storage, serial, lambda line: None)
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    for info in manifest.corpus(corpus.name).shards:
        reader = ShardReader(storage.local_path(f"{manifest.folder}/{info.path}"), info)
        for row in range(info.rows):
            source, lengths, _, _ = reader.row(row)
            starts = np.cumsum(lengths) - lengths
            assert (source[starts] == tokenizer.prefixes[prefix]).all()
    tree["data"]["tokenizer"]["prefixes"] = ["summarise: "]
    with pytest.raises(DataError, match=r"data.tokenizer.prefixes: no corpus .* 'summarise: '"):
        prepare(parse_config(tree, "test"), storage, serial, lambda line: None)
