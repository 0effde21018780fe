"""Values of Parquet and Arrow columns as text, and image columns as bytes."""

import datetime
import decimal
import json
import uuid
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.schema import CorpusSection
from data.files import list_files
from data.held_out import is_held_out_record, record_row
from data.sources import read_records
from data.tables import BATCH_ROWS, table_records


def corpus(path, kind, **more):
    return CorpusSection(**{"name": "c", "kind": kind, "path": str(path), "source": "x", "target": "{a}", **more})


def read(section, binary=()):
    return [record for file in list_files(section) for record in read_records(section, file, Counter(), binary)]


def write(table, path):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_of_every_kind_are_spelled_as_documented(tmp_path, kind):
    moment = datetime.datetime(2024, 5, 31, 13, 30, 0, 25)
    columns = {
        "date": (pa.array([moment.date(), None]), ["2024-05-31", ""]),
        "moment": (pa.array([moment, None]), ["2024-05-31 13:30:00.000025", ""]),
        "nanoseconds": (pa.array([1_700_000_000_000_000_001, 0], pa.timestamp("ns")), ["2023-11-14 22:13:20", None]),
        "zone": (pa.array([0, None], pa.timestamp("s", "+02:00")), ["1970-01-01 02:00:00+02:00", ""]),
        "decimal": (pa.array([decimal.Decimal("1.50"), None]), ["1.50", ""]),
        "dictionary": (pa.array(["p", None]).dictionary_encode(), ["p", ""]),
        "large": (pa.array(["text", None], pa.large_string()), ["text", ""]),
        "list": (pa.array([["a", None, "é"], []]), ['["a", null, "é"]', "[]"]),
        "struct": (pa.array([{"x": 1, "when": moment.date()}, None]), ['{"x": 1, "when": "2024-05-31"}', ""]),
        "map": (pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())), ['[["k", 1]]', ""]),
        "truth": (pa.array([True, None]), ["true", ""]),
        "number": (pa.array([1.5, None]), ["1.5", ""]),
        "dotted.name": (pa.array(["d", "e"]), ["d", "e"]),
        "nothing": (pa.nulls(2), ["", ""]),
        "hidden": (pa.array([[b"x"], []]), None),
    }
    write(pa.table({name: array for name, (array, _) in columns.items()}), tmp_path / f"t.{kind}")
    found = read(corpus(tmp_path, kind))
    for name, (_, texts) in columns.items():
        if texts is None:
            assert name not in found[0]
            continue
        for record, text in zip(found, texts, strict=True):
            assert text is None or record[name] == text, name


def test_an_identifier_of_sixteen_bytes_is_text():
    number = uuid.uuid4()
    table = pa.table({"id": pa.array([number.bytes], pa.uuid())})
    assert list(table_records([table], "x")) == [{"id": str(number)}]


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_image_columns_are_bytes_where_they_are_asked_for(tmp_path, kind):
    (tmp_path / "picture.png").write_bytes(PNG + b"path")
    images = {
        "plain": pa.array([PNG + b"1", None, b""]),
        "large": pa.array([PNG + b"2", None, b""], pa.large_binary()),
        "struct": pa.array(
            [
                {"bytes": PNG + b"3", "path": "name.png"},
                {"bytes": None, "path": str(tmp_path / "picture.png")},
                {"bytes": None, "path": None},
            ],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
    }
    write(pa.table({"a": ["x", "y", "z"], **images}), tmp_path / f"t.{kind}")
    section = corpus(tmp_path, kind)
    assert read(section) == [{"a": "x"}, {"a": "y"}, {"a": "z"}]
    assert read(section, ("plain",)) == [{"a": a, "plain": b} for a, b in (("x", PNG + b"1"), ("y", b""), ("z", b""))]
    assert [record["large"] for record in read(section, ("large", "struct"))] == [PNG + b"2", b"", b""]
    assert [record["struct"] for record in read(section, ("struct",))] == [PNG + b"3", PNG + b"path", b""]
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .*column 'a' holds string, no image: .*another"):
        read(section, ("a",))
    with pytest.raises(DataError, match=r"has no column 'picture', .*columns there: a, plain, large, struct"):
        read(section, ("picture",))
    (tmp_path / "picture.png").unlink()
    with pytest.raises(DataError, match=r"column 'struct': image .*picture\.png cannot be read .*put it there"):
        read(section, ("struct",))


def test_images_of_a_folder_that_the_datasets_library_reads(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set/train"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", "a": f"caption {n}"}) + "\n" for n in range(3))
    )
    section = corpus(tmp_path / "set", "hf")
    assert [record["a"] for record in read(section)] == [f"caption {n}" for n in range(3)]
    found = read(section, ("image",))
    assert [record["image"] for record in found] == [(folder / f"{n}.png").read_bytes() for n in range(3)]


def test_large_images_are_in_memory_a_few_at_a_time(tmp_path):
    megabyte = bytes(range(256)) * 4096
    table = pa.table({"a": [str(i) for i in range(160)], "image": [megabyte] * 160})
    # Pages hold as many rows as are written at once, and are read whole.
    plain = {"compression": "none", "use_dictionary": False, "row_group_size": 160, "write_batch_size": 2}
    pq.write_table(table, tmp_path / "t.parquet", **plain)
    del table
    before, peak, rows = pa.total_allocated_bytes(), 0, 0
    section = corpus(tmp_path, "parquet")
    (file,) = list_files(section)
    for record in read_records(section, file, Counter(), ("image",)):
        assert record == {"a": str(rows), "image": megabyte}
        rows += 1
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert rows == 160 < BATCH_ROWS and peak < 80e6


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_unusable_columns_are_named(tmp_path, kind):
    write(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / f"t.{kind}")
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .*has the column 'a' twice; write the table again"):
        read(corpus(tmp_path, kind))
    bad = pa.array([b"\xff\xfe"]).view(pa.string())
    write(pa.table({"a": bad}), tmp_path / f"t.{kind}")
    with pytest.raises(DataError, match=rf"data\.corpora\[c\]\.path: .*t\.{kind} holds text that is not UTF-8"):
        read(corpus(tmp_path, kind))


def test_halves_of_characters_in_json_are_mended(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00 \\ud800 x", "b\\udc00": ["\\uDBFF"]}\n')
    (tmp_path / "b.json").write_text('["\\ud83d\\ude00", "\\ude00"]')
    assert read(corpus(tmp_path / "a.jsonl", "jsonl")) == [{"a": "😀 \ufffd x", "b\ufffd": '["\ufffd"]'}]
    assert read(corpus(tmp_path / "b.json", "json")) == [{"text": "😀"}, {"text": "\ufffd"}]


def test_records_with_images_are_held_out_by_all_fields_and_stored_without_them():
    one, two = {"a": "x", "image": b"1"}, {"a": "x", "image": b"2"}
    sides = {is_held_out_record({"a": "x", "image": bytes([n])}, 0.5, None) for n in range(64)}
    assert sides == {True, False}
    assert is_held_out_record(one, 0.5, None) == is_held_out_record(dict(one), 0.5, None)
    assert is_held_out_record(one, 0.5, "a") == is_held_out_record(two, 0.5, "a")
    assert json.loads(record_row("s", "t", one)["fields"]) == {"a": "x"}
