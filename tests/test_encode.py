"""Texts to shards and back: every layout and packing holds each token of the corpus as it should."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import data.encode
import data.packing
from cluster.storage import Storage
from configs.errors import ConfigError, DataError
from configs.load import parse_config
from data.encode import TOKENIZER, EncodeTask, encode
from data.extract import TEXTS, Chunk
from data.files import list_files
from data.held_out import read_records
from data.packing import fit_source
from data.prepare import prepare
from data.rows import RowFormat
from data.runners import serial
from data.shards import ShardReader
from data.sources import read_records as read_files
from data.tokenizer import Tokenizer

SOURCE_TOKENS, CAPACITY = 40, 32
FORMS = [
    RowFormat("pairs", "best_fit", SOURCE_TOKENS, CAPACITY),
    RowFormat("pairs", "none", SOURCE_TOKENS, CAPACITY),
    RowFormat("sequence", "best_fit", 1, CAPACITY),
    RowFormat("sequence", "chunk", 1, CAPACITY),
    RowFormat("sequence", "none", 1, CAPACITY),
]


def named(form):
    return f"{form.layout}-{form.packing}"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([Path(__file__).read_text()], 400)


def records():
    """(source, target) texts of all kinds: short, long, without source, without target, with a long prompt."""
    generator = np.random.default_rng(1)
    words = sorted(set(Path(__file__).read_text().split()))
    for _ in range(150):
        sizes = generator.choice([0, 1, 3, 8, 30, 60], size=2)
        yield tuple(" ".join(generator.choice(words, size=size)) for size in sizes)


@pytest.fixture
def store(tmp_path, tokenizer):
    storage = Storage(str(tmp_path / "store"))
    storage.write_bytes(f"d/{TOKENIZER}", tokenizer.to_bytes())
    return storage


def task_of(store, form, texts, shard_rows=20):
    buffer = io.BytesIO()
    table = pa.table(dict(zip(("source", "target"), zip(*texts, strict=True), strict=True)), schema=TEXTS)
    with pa.ipc.new_file(buffer, TEXTS) as writer:
        writer.write_table(table)
    store.write_bytes("d/work/texts.arrow", buffer.getvalue())
    return EncodeTask(store.url, "d", Chunk("c", "work/texts.arrow", len(texts), 0), 0, form, None, shard_rows, 4)


def read_back(store, shards, folder="d"):
    """Rows of all shards as lists of (source, labels) pairs of lists."""
    rows = []
    for shard in shards:
        reader = ShardReader(store.local_path(f"{folder}/{shard.path}"), shard)
        for number in range(shard.rows):
            source, source_lengths, target, target_lengths = reader.row(number)
            assert len(source_lengths) == len(target_lengths) > 0
            sources = np.split(source, np.cumsum(source_lengths)[:-1])
            targets = np.split(target, np.cumsum(target_lengths)[:-1])
            rows.append([(s.tolist(), t.tolist()) for s, t in zip(sources, targets, strict=True)])
    return rows


def expected_pieces(tokenizer, texts, form):
    """All (source, labels) that the corpus must give, cut by a loop that knows nothing of the packers."""
    for source, target in texts:
        prompt, labels = tokenizer.encode(source), [*tokenizer.encode(target), tokenizer.eos_id]
        if form.layout == "pairs":
            for start in range(0, len(labels), CAPACITY):
                piece = labels[start : start + CAPACITY]
                before = prompt + labels[:start]
                room = SOURCE_TOKENS
                if start:
                    room = max(-(-SOURCE_TOKENS * len(piece) // CAPACITY), SOURCE_TOKENS // 4)
                yield fit_source(np.array(before, dtype=int), room).tolist(), piece
        else:
            room = max(CAPACITY - len(labels), CAPACITY // 2)
            prompt = fit_source(np.array(prompt, dtype=int), room).tolist()
            start, end = 0, CAPACITY - len(prompt)
            yield prompt, labels[:end]
            while end < len(labels):
                start, end = end, end + CAPACITY - 1
                yield [labels[start - 1]], labels[start:end]


@pytest.mark.parametrize("form", [form for form in FORMS if form.packing != "chunk"], ids=named)
def test_shards_hold_the_pieces_of_every_text_and_nothing_else(store, tokenizer, form):
    texts = [(source or "x", target) if form.layout == "pairs" else (source, target) for source, target in records()]
    result = encode(task_of(store, form, texts))
    rows = read_back(store, result.shards)
    pieces = sorted(expected_pieces(tokenizer, texts, form))
    assert sorted(pair for row in rows for pair in row) == pieces
    assert result.pairs == len(pieces)
    assert result.truncated_source_tokens == sum(
        len(tokenizer.encode(each[0])) - len(next(expected_pieces(tokenizer, [each], form))[0]) for each in texts
    )
    assert result.cut_targets == sum(len(list(expected_pieces(tokenizer, [each], form))) > 1 for each in texts)
    assert len(result.shards) > 2 and [shard.rows for shard in result.shards[:-1]] == [20] * (len(result.shards) - 1)
    for shard in result.shards:
        own = [pair for row in read_back(store, [shard]) for pair in row]
        assert shard.source_tokens == sum(len(source) for source, _ in own)
        assert shard.target_tokens == sum(len(labels) for _, labels in own)
    for row in rows:
        sources, labels = (sum(len(pair[side]) for pair in row) for side in (0, 1))
        if form.layout == "pairs":
            assert sources <= SOURCE_TOKENS and labels <= CAPACITY
        else:
            assert sources + labels <= CAPACITY
        assert form.packing != "none" or len(row) == 1


def test_chunked_shards_are_the_corpus_cut_every_capacity_tokens(store, tokenizer):
    form = RowFormat("sequence", "chunk", 1, CAPACITY)
    result = encode(task_of(store, form, list(records())))
    rows = read_back(store, result.shards)
    # By hand: prompts shortened, then one token after the other, each with whether it is a label.
    expected: list[list[tuple[int, bool]]] = [[]]
    contexts = 0
    for source, target in records():
        labels = [*tokenizer.encode(target), tokenizer.eos_id]
        room = max(CAPACITY - len(labels), CAPACITY // 2)
        prompt = fit_source(np.array(tokenizer.encode(source), dtype=int), room).tolist()
        stream = [(token, False) for token in prompt] + [(token, True) for token in labels]
        for at, item in enumerate(stream):
            if len(expected[-1]) == CAPACITY:
                expected.append([(stream[at - 1][0], False)] if at else [])
                contexts += at > 0
            expected[-1].append(item)
    found = [[(t, side == 1) for pair in row for side in (0, 1) for t in pair[side]] for row in rows]
    assert sorted(found) == sorted(expected)
    assert all(len(row) == CAPACITY for row in found[:-1]) and len(found[-1]) == len(expected[-1])
    assert result.pairs == sum(map(len, rows)) and 0 < result.cut_targets < 150
    kept = sum(not is_label for row in expected for _, is_label in row) - contexts
    assert result.truncated_source_tokens == sum(len(tokenizer.encode(source)) for source, _ in records()) - kept > 0


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_bytes_do_not_depend_on_how_texts_are_batched(store, form, monkeypatch):
    texts = [(source or "x", target) for source, target in records()]
    digests = []
    for limit in (4096, 7):
        monkeypatch.setattr(data.encode, "ENCODE_RECORDS", limit)
        store.remove("d/work")
        digests.append([shard.digest for shard in encode(task_of(store, form, texts)).shards])
    monkeypatch.setattr(data.encode, "ENCODE_BYTES", 50)
    store.remove("d/work")
    digests.append([shard.digest for shard in encode(task_of(store, form, texts)).shards])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_what_is_not_yet_in_a_shard_is_bounded(store, form, monkeypatch):
    """Shards are written while texts are still being read, not after the last."""
    monkeypatch.setattr(data.encode, "ENCODE_RECORDS", 5)
    monkeypatch.setattr(data.packing, "WINDOW_PAIRS", 10)
    read, seen = [0], []
    encode_batch, write_shard = Tokenizer.encode_batch, data.encode.write_shard

    def counting(self, texts, prefix=None):
        read[0] += len(texts) / 2
        return encode_batch(self, texts, prefix)

    def watching(*arguments):
        seen.append(read[0])
        return write_shard(*arguments)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    monkeypatch.setattr(data.encode, "write_shard", watching)
    encode(task_of(store, form, [(source or "x", target) for source, target in records()], shard_rows=8))
    assert seen == sorted(seen) and seen[0] <= 40 and seen[-1] == 150


# The whole preparation


def config_of(folder, corpora, **fields):
    tree = {
        "data": {
            "corpora": corpora,
            "tokenizer": {"vocabulary_size": 400},
            "source_tokens": 24,
            "target_tokens": 32,
            "shard_rows": 16,
            "block_rows": 4,
            "held_out_fraction": 0.1,
            **fields,
        },
        "train": {"steps": 1, "global_batch_sequences": 4, "micro_batch_sequences": 2},
    }
    return parse_config(tree, "test")


def write_prose(folder):
    folder.mkdir()
    for number in range(8):
        digests = [hashlib.sha256(bytes([line, number])).hexdigest() for line in range(40)]
        lines = [f"Line {line} of text {number} tells of {digest}." for line, digest in enumerate(digests)]
        (folder / f"{number}.txt").write_text("\n\n".join(lines))


@pytest.mark.parametrize("packing", ["best_fit", "chunk", "none"])
def test_prose_in_layout_sequence_is_one_target_without_a_source(tmp_path, packing):
    write_prose(tmp_path / "prose")
    corpus = {"name": "prose", "kind": "text", "path": str(tmp_path / "prose"), "target": "{text}"}
    storages = {}
    for continuation in (True, False):
        storage = Storage(str(tmp_path / f"store-{continuation}"))
        config = config_of(tmp_path, [{**corpus, "continuation": continuation}], layout="sequence", packing=packing)
        storages[continuation] = storage, prepare(config, storage, serial, lambda line: None)
    storage, manifest = storages[True]
    rows = read_back(storage, manifest.corpora[0].shards, manifest.folder)
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    held = {record.fields["path"] for record in read_records(storage, manifest, "prose", 10**6, 0)}
    section = config.data.corpora[0]
    texts = [
        record["text"]
        for file in list_files(section)
        if file.relative not in held
        for record in read_files(section, file, Counter())
    ]
    assert held and len(texts) == manifest.corpora[0].counts["records"] > 8
    pieces = [pair for row in rows for pair in row]
    # All sources are one token of context, or nothing where a text begins.
    assert {len(source) for source, _ in pieces} == {0, 1}
    assert sum(not source for source, _ in pieces) == len(texts)
    found = Counter(token for _, labels in pieces for token in labels)
    assert found == Counter(token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id])
    # A template without a source means the same as continuation.
    other = storages[False][1]
    assert [shard.digest for shard in other.corpora[0].shards] == [shard.digest for shard in manifest.corpora[0].shards]
    assert manifest.corpora[0].held_out.rows > 0


def test_an_empty_source_is_no_record_where_a_template_or_an_encoder_wants_one(tmp_path):
    rows = [{"q": "" if number % 2 else "what", "a": f"it is {number}"} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = {"name": "a", "kind": "jsonl", "path": str(tmp_path / "a.jsonl"), "target": "{a}"}
    for source, layout, kept in (("{q}", "pairs", False), ("{q}", "sequence", False), ("", "sequence", True)):
        config = config_of(tmp_path, [{**corpus, "source": source}], layout=layout, held_out_fraction=0.0)
        storage = Storage(str(tmp_path / f"{layout}-{bool(source)}"))
        manifest = prepare(config, storage, serial, lambda line: None)
        assert manifest.corpora[0].counts["records"] == (60 if kept else 30)
    with pytest.raises(DataError, match=r"data\.corpora\[a\]\.source: empty"):
        prepare(config_of(tmp_path, [corpus]), Storage(str(tmp_path / "none")), serial, lambda line: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "chunk"}, "data.packing: chunk cuts texts .*set data.packing to best_fit or none"),
        ({"bucket_batches": 4}, "data.bucket_batches: samples of packing best_fit .*set data.packing to none"),
        ({"layout": "sequence", "target_tokens": 1}, "data.target_tokens: layout sequence needs 2 or more"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_with_the_fix(tmp_path, fields, message):
    corpus = {"name": "a", "kind": "text", "path": "x", "target": "{text}", "continuation": True}
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, [corpus], **fields)
    config_of(tmp_path, [corpus], packing="none", bucket_batches=4)
    config_of(tmp_path, [corpus], packing="chunk", layout="sequence")
