"""Kinds of sources beside python, text and jsonl: their records, their errors, and files that are held out by name."""

import csv
import gzip
import io
import json
import tracemalloc
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError, StorageError
from configs.load import parse_config
from configs.schema import CorpusSection
from data.delimited import delimited
from data.files import list_files
from data.sources import has_content, read_records


def corpus(path, kind, **more):
    return CorpusSection(**{"name": "c", "kind": kind, "path": str(path), "source": "x", "target": "{a}", **more})


def records(section):
    return [record for file in list_files(section) for record in read_records(section, file, Counter())]


ROWS = [{"a": "one, two", "n": 1, "l": ["x", "é"]}, {"a": 'say "no"\nor not', "n": None, "l": []}]
AS_RECORDS = [{"a": "one, two", "n": "1", "l": '["x", "é"]'}, {"a": 'say "no"\nor not', "n": "", "l": "[]"}]
CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(table=st.lists(st.tuples(CELL, CELL), max_size=8), separator=st.sampled_from(",\t"))
def test_what_the_csv_module_writes_is_read_back(table, separator):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator, lineterminator="\n").writerows([("a", "b"), *table])
    lines = buffer.getvalue().split("\n")
    found = list(delimited([line + "\n" for line in lines[:-1]], separator, True, (), "x"))
    assert found == [{"a": a, "b": b} for a, b in table]


def test_delimited_files_with_and_without_header_and_quotes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n"1,""x""","two\r\nlines"\r\n\r\n3,4\r\n')
    assert records(corpus(tmp_path, "csv")) == [{"a": '1,"x"', "b": "two\nlines"}, {"a": "3", "b": "4"}]
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress('"Hi", she said.\tHola\nYes\t"Sí\n'.encode()))
    section = corpus(tmp_path, "tsv", columns=("a", "es"), quotes=False)
    assert records(section) == [{"a": '"Hi", she said.', "es": "Hola"}, {"a": "Yes", "es": '"Sí'}]
    (tmp_path / "long.csv").write_text("a\n" + "word " * 100_000 + "\n")
    assert len(records(corpus(tmp_path / "long.csv", "csv"))[0]["a"]) == 500_000


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ("a,b\n1,2\n3\n", {}, r"a\.csv line 3 has 1 values, there are 2 columns \(a, b\); mend"),
        ('a,b\n1,"2\n3,4\n', {}, r"a\.csv line 2: unexpected end of data \(read up to line 3\); .*quotes: false"),
        ("a,a\n1,2\n", {}, r"a\.csv line 1 names the column 'a' twice"),
        ("1,2,3\n", {"columns": ("a", "b")}, r"line 1 has 3 values, there are 2 columns"),
    ],
)
def test_wrong_delimited_lines_are_named(tmp_path, content, more, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rf"data\.corpora\[c\]\.path: .*{says}"):
        records(corpus(tmp_path, "csv", **more))


def write_arrow(path, rows, stream):
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def test_parquet_and_both_arrow_formats_give_the_same_records_without_binary_columns(tmp_path):
    rows = [{**row, "image": {"bytes": b"\x00\xff", "path": "p"}, "raw": b"\xff"} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_arrow(tmp_path / "file.arrow", rows, stream=False)
    write_arrow(tmp_path / "stream.arrow", rows, stream=True)
    assert records(corpus(tmp_path, "parquet")) == AS_RECORDS
    assert records(corpus(tmp_path / "file.arrow", "arrow")) == AS_RECORDS
    assert records(corpus(tmp_path / "stream.arrow", "arrow")) == AS_RECORDS
    memory = fsspec.filesystem("memory")
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        memory.pipe_file(f"/kinds-test/{name}", (tmp_path / name).read_bytes())
    try:
        assert records(corpus("memory://kinds-test", "parquet")) == AS_RECORDS
        assert records(corpus("memory://kinds-test", "arrow")) == AS_RECORDS * 2
    finally:
        memory.rm("/kinds-test", recursive=True)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables_are_named(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(b"no table at all, but long enough for a footer")
    with pytest.raises(DataError, match=rf"data\.corpora\[c\]\.path: .*a\.{kind} is no whole .*replace or exclude"):
        records(corpus(tmp_path, kind))
    write_arrow(tmp_path / "b.arrow", ROWS, stream=True)
    (tmp_path / "b.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[:-120])
    with pytest.raises(DataError, match=r"b\.arrow is no whole Arrow"):
        records(corpus(tmp_path / "b.arrow", "arrow"))


def test_large_tables_are_read_in_bounded_memory(tmp_path):
    text = ["".join(chr(97 + (i * j) % 26) for j in range(400)) for i in range(500)]
    table = pa.table({"a": text * 100})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5000, compression="none", use_dictionary=False)
    with (tmp_path / "a.csv").open("w") as file:
        file.write("a\n")
        file.writelines(f"{line}\n" for line in text * 100)
    for kind in ("parquet", "csv"):
        section = corpus(tmp_path, kind)
        (file,) = list_files(section)
        assert file.bytes > 19e6
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        arrow_peak = rows = 0
        for _ in read_records(section, file, Counter()):
            rows += 1
            if rows % 100 == 0:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - before)
        python_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == 50_000 and arrow_peak + python_peak < file.bytes / 3, (kind, arrow_peak, python_peak)


def write_lines(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def test_parallel_files_are_aligned_by_line(tmp_path):
    write_lines(tmp_path / "train.en.gz", ["Hi", "a\u2028b", ""])
    write_lines(tmp_path / "train.de.gz", ["Hallo", "c", "leer"])
    write_lines(tmp_path / "val.en.gz", ["Yes"])
    write_lines(tmp_path / "val.de.gz", ["Ja"])
    section = corpus(tmp_path / "train.{column}.gz", "parallel", columns=("en", "de"))
    expected = [{"en": "Hi", "de": "Hallo"}, {"en": "a\u2028b", "de": "c"}, {"en": "", "de": "leer"}]
    assert records(section) == expected
    every = corpus(tmp_path / "*.{column}.gz", "parallel", columns=("en", "de"))
    assert records(every) == [*expected, {"en": "Yes", "de": "Ja"}]
    split = every.model_copy(update={"held_out": str(tmp_path / "val.{column}.gz")})
    assert [(file.relative, file.held_out) for file in list_files(split)] == [
        ("train.en.gz+train.de.gz", False),
        ("val.en.gz+val.de.gz", True),
    ]
    write_lines(tmp_path / "train.de.gz", ["Hallo"])
    with pytest.raises(DataError, match=r"train\.en\.gz has 3 lines and .*train\.de\.gz has 1 lines; line n of each"):
        records(section)
    (tmp_path / "val.de.gz").unlink()
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .*unequal numbers of files \(en: 2, de: 1\)"):
        list_files(every)


def test_nested_json_gives_records_with_the_outer_fields(tmp_path):
    document = {
        "version": 1,
        "data": [
            {"title": "T", "qas": [{"q": "a?", "answers": [{"text": "x"}, {"text": "y"}]}, {"q": "b?", "answers": []}]}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document, indent=2))
    assert records(corpus(tmp_path, "json", records="data.qas.answers")) == [
        {"version": "1", "title": "T", "q": "a?", "text": "x"},
        {"version": "1", "title": "T", "q": "a?", "text": "y"},
    ]
    assert [record["q"] for record in records(corpus(tmp_path, "json", records="data.qas"))] == ["a?", "b?"]
    with pytest.raises(DataError, match=r"a\.json: the path of `records` asks for 'rows' .*fields there: title, qas"):
        records(corpus(tmp_path, "json", records="data.rows"))
    (tmp_path / "a.json").write_text('{"actors": {"Ann": ["Ann is", "Ann was"], "Bob": ["Bob is"]}}')
    assert records(corpus(tmp_path, "json", records="*.*")) == [
        {"key": "Ann", "text": "Ann is"},
        {"key": "Ann", "text": "Ann was"},
        {"key": "Bob", "text": "Bob is"},
    ]
    (tmp_path / "a.json").write_text('[{"a": 1},\n{"a": ]')
    with pytest.raises(DataError, match=r"a\.json is no JSON document \(.*line 2 column 7\).*kind: jsonl"):
        records(corpus(tmp_path, "json"))
    (tmp_path / "b.jsonl").write_text('{"id": 7, "turns": ["Hi", "Bye"]}\n')
    assert records(corpus(tmp_path, "jsonl", records="turns")) == [
        {"id": "7", "text": "Hi"},
        {"id": "7", "text": "Bye"},
    ]


def test_a_json_document_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.json_source.MOST_DOCUMENT_BYTES", 20)
    (tmp_path / "a.json").write_text(json.dumps([{"a": "x" * 30}]))
    with pytest.raises(DataError, match=r"a\.json is a JSON document of more than 20 bytes.*kind: jsonl"):
        records(corpus(tmp_path, "json"))


def test_local_hugging_face_data_sets_stream_by_split(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        image = {"bytes": b"\x89PNG", "path": None}
        pq.write_table(pa.Table.from_pylist([{**row, "image": image} for row in rows]), folder / f"{split}.parquet")
    section = corpus(folder, "hf", held_out="validation")
    train, held = list_files(section)
    assert (train.relative, train.held_out, held.relative, held.held_out) == ("train", False, "validation", True)
    assert list(read_records(section, train, Counter())) == AS_RECORDS
    assert list(read_records(section, held, Counter())) == AS_RECORDS[:1]
    assert has_content(section, held)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .* has no split 'test'; splits there: train, vali"):
        list_files(corpus(folder, "hf", split="test"))
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .*nowhere is no folder"):
        list_files(corpus(tmp_path / "nowhere", "hf"))
    pq.write_table(pa.Table.from_pylist(ROWS * 2), folder / "train.parquet")
    assert list_files(section)[0].version != train.version


def test_a_hub_data_set_is_pinned_to_its_commit_or_refused(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    from data import hf_source

    class Info:
        sha = "abc123"

    asked = []

    def info(self, name, revision):
        asked.append((name, revision))
        return Info

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(hf_source, "_check_split", lambda *arguments: None)
    (file,) = list_files(corpus("hf://me/set@v2", "hf"))
    assert asked == [("me/set", "v2")] and file.url == "hf://me/set@abc123" and file.version == "abc123"
    assert hf_source._arguments(corpus("hf://me/set", "hf", subset="s"), file.url) == {
        "path": "me/set",
        "config_name": "s",
        "revision": "abc123",
    }

    def offline(self, name, revision):
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: the Hugging Face Hub gives no data set 'me/set'"):
        list_files(corpus("hf://me/set", "hf"))


def test_a_hub_that_breaks_off_is_no_fault_of_the_data(monkeypatch):
    from data import hf_source

    def breaks_off(*arguments):
        yield pa.table({"a": ["x"]})
        raise ConnectionError("reset by peer")

    class Stream:
        def with_format(self, name):
            return self

        iter = breaks_off

    monkeypatch.setattr(hf_source, "_stream", lambda *arguments: Stream())
    section = corpus("hf://me/set", "hf")
    found = hf_source.tables(section, "hf://me/set@abc", "train")
    assert next(found).num_rows == 1
    with pytest.raises(StorageError, match=r"data\.corpora\[c\]\.path: .*hf://me/set@abc: reset by peer; run the same"):
        next(found)


def test_files_that_are_held_out_are_not_trained_on(tmp_path):
    for name in ("a", "b", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"a": "x"}\n')
    section = corpus(tmp_path, "jsonl", held_out=str(tmp_path / "test.jsonl"))
    assert [(file.relative, file.held_out) for file in list_files(section)] == [
        ("a.jsonl", False),
        ("b.jsonl", False),
        ("test.jsonl", True),
    ]
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.held_out: .*nothing\.jsonl does not exist"):
        list_files(corpus(tmp_path, "jsonl", held_out=str(tmp_path / "nothing.jsonl")))
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.held_out: .* holds all files"):
        list_files(corpus(tmp_path, "jsonl", held_out=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "text", "columns": ["a"]}, r"corpora\.0\.columns: only kind: csv or tsv or parallel has it"),
        ({"kind": "csv", "records": "a"}, r"corpora\.0\.records: only kind: json or jsonl"),
        ({"kind": "csv", "split": "test"}, r"corpora\.0\.split: only kind: hf"),
        ({"kind": "parallel", "columns": ["a", "b"]}, r"corpora\.0\.path: 'x' lacks \{column\}"),
        ({"kind": "parallel", "path": "x.{column}"}, r"corpora\.0\.columns: kind: parallel needs two"),
        ({"kind": "csv", "columns": ["a", "a"]}, r"corpora\.0\.columns: .*a name twice"),
        ({"kind": "csv", "held_out": "y", "held_out_key": "a"}, r"corpora\.0\.held_out_key: .*leave one"),
        ({"kind": "csv", "target_characters": [9, 3]}, r"corpora\.0\.target_characters: \[9, 3\] must be"),
        ({"kind": "text", "continuation": True, "source_characters": [1, 3]}, r"source_characters: .*use target_char"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, says):
    section = {"name": "c", "path": "x", "source": "y", "target": "{a}", **fields}
    tree = {
        "data": {"corpora": [section]},
        "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
    }
    with pytest.raises(ConfigError, match=says):
        parse_config(tree, "test")
