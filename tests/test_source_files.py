"""Where input files come from and how their bytes become lines: folders, links, archives, web servers, long lines."""

import gzip
import io
import json
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import DataError, StorageError
from configs.schema import CorpusSection
from data.files import list_files
from data.opening import lines, opened
from data.sources import read_records


def corpus(path, kind="jsonl", **more):
    return CorpusSection(**{"name": "c", "kind": kind, "path": str(path), "source": "x", "target": "{a}", **more})


def records(section):
    return [record for file in list_files(section) for record in read_records(section, file, Counter())]


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"a": value}) + "\n" for value in values))


def test_a_file_that_is_held_out_below_the_folder_is_not_trained_on(tmp_path):
    for name in ("x", "sub/test", "sub/deep/test"):
        write(tmp_path / f"{name}.jsonl", name)
    section = corpus(tmp_path, held_out=f"{tmp_path}/sub/test.jsonl")
    assert [(file.relative, file.held_out) for file in list_files(section)] == [
        ("sub/deep/test.jsonl", False),
        ("x.jsonl", False),
        ("test.jsonl", True),
    ]
    section = corpus(f"{tmp_path}/**/*.jsonl", held_out=f"{tmp_path}/sub/../sub/**/test.jsonl")
    assert [record["a"] for record in records(corpus(f"{tmp_path}/**/*.jsonl"))] == ["sub/deep/test", "sub/test", "x"]
    held = {file.url for file in list_files(section) if file.held_out}
    assert len(held) == 2 and not held & {file.url for file in list_files(section) if not file.held_out}


def test_links_are_followed_and_their_targets_watched(tmp_path):
    write(tmp_path / "blobs/one", "first")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "blobs/one")
    (folder / "folder.jsonl").symlink_to(tmp_path / "blobs")
    for path in (folder, f"{folder}/*.jsonl", f"{folder}/a.jsonl"):
        assert records(corpus(path)) == [{"a": "first"}]
        (before,) = list_files(corpus(path))
        write(tmp_path / "blobs/one", "other", "content")
        (after,) = list_files(corpus(path))
        assert after.version != before.version and after.bytes == (tmp_path / "blobs/one").stat().st_size
        write(tmp_path / "blobs/one", "first")


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    write(tmp_path / "data[1].jsonl", "x")
    assert records(corpus(tmp_path / "data[1].jsonl")) == [{"a": "x"}]
    with pytest.raises(DataError, match=r"data\[2\]\.jsonl matches"):
        list_files(corpus(tmp_path / "data[2].jsonl"))


def test_files_in_archives_are_read_through_chained_urls(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.jsonl", '{"a": "zipped"}\n')
        archive.writestr("in/b.jsonl.gz", gzip.compress(b'{"a": "twice"}\n'))
    section = corpus(f"zip://in/*.jsonl*::{tmp_path}/all.zip")
    assert records(section) == [{"a": "zipped"}, {"a": "twice"}]
    before = [file.version for file in list_files(section)]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.jsonl", '{"a": "Zipped"}\n')
        archive.writestr("in/b.jsonl.gz", gzip.compress(b'{"a": "twice"}\n'))
    assert list_files(section)[0].version != before[0]


class Server(BaseHTTPRequestHandler):
    """Gives whole files only; a folder ends in a slash and lists links; `broken` names give errors."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / unquote(self.path).lstrip("/")
        if "busy" in self.path and with_body:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in path.iterdir())
            content, version = "".join(f'<a href="{name}">{name}</a>' for name in names).encode(), "folder"
        elif path.is_file():
            content, version = path.read_bytes(), str(path.stat().st_mtime_ns)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", version)
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) // 2] if "short" in self.path else content)
            self.close_connection = "short" in self.path


@pytest.fixture
def web(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.folder = tmp_path
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_server_without_ranges_gives_large_files_and_tables(tmp_path, web):
    text = "word " * 200
    write(tmp_path / "large.jsonl", *[text] * 7000)
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress((tmp_path / "large.jsonl").read_bytes(), 1))
    table = pa.table({"a": [f"{i:040d}" * 20 for i in range(8000)]})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size > 6e6 < (tmp_path / "large.jsonl").stat().st_size
    for name in ("large.jsonl", "large.jsonl.gz"):
        found = records(corpus(f"{web}/{name}"))
        assert len(found) == 7000 and found[-1] == {"a": text}
    assert [record["a"] for record in records(corpus(f"{web}/t.parquet", "parquet"))] == table["a"].to_pylist()


def test_folders_and_patterns_on_a_web_server_and_changes_there(tmp_path, web):
    for name in ("set/a.jsonl", "set/sub/b.jsonl"):
        write(tmp_path / name, name)
    (tmp_path / "set/readme.html").write_text("<p>no corpus</p>")
    assert [record["a"] for record in records(corpus(f"{web}/set/"))] == ["set/a.jsonl", "set/sub/b.jsonl"]
    section = corpus(f"{web}/set/*.jsonl")
    assert [record["a"] for record in records(section)] == ["set/a.jsonl"]
    (before,) = list_files(section)
    write(tmp_path / "set/a.jsonl", "set/b.jsonl")
    (after,) = list_files(section)
    assert before.version != after.version and before.bytes == after.bytes


def test_what_a_web_server_does_not_give_is_named(tmp_path, web):
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: http.*none\.jsonl does not exist"):
        records(corpus(f"{web}/none.jsonl"))
    write(tmp_path / "busy.jsonl", "x")
    with pytest.raises(StorageError, match=r"data\.corpora\[c\]\.path: http.*busy\.jsonl cannot be read \(503.*again"):
        records(corpus(f"{web}/busy.jsonl"))
    write(tmp_path / "short.jsonl", "x" * 1000)
    with pytest.raises(StorageError, match=r"short\.jsonl cannot be read .*keeps what is prepared"):
        records(corpus(f"{web}/short.jsonl"))
    with pytest.raises(StorageError, match=r"data\.corpora\[c\]\.path: http://127\.0\.0\.1:9/x cannot be listed \("):
        records(corpus("http://127.0.0.1:9/x"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "a.jsonl", "x")
    (file,) = list_files(corpus(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl disappeared"):
        list(read_records(corpus(tmp_path), file, Counter()))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl is a folder"):
        list(read_records(corpus(tmp_path), file, Counter()))


@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "csv", "parallel"])
def test_marks_of_windows_leave_no_trace(tmp_path, kind):
    contents = {
        "text": "one\r\n\r\ntwo",
        "jsonl": '{"a": "one"}\r\n\r\n{"a": "two"}\r\n',
        "json": '[{"a": "one"},\r\n{"a": "two"}]',
        "csv": 'a\r\n"one"\r\ntwo\r\n',
        "parallel": "one\r\ntwo\r\n",
    }
    for name in ("x.1", "x.2"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + contents[kind].encode())
    path = f"{tmp_path}/x.{{column}}" if kind == "parallel" else tmp_path / "x.1"
    section = corpus(path, kind, columns=("1", "2") if kind == "parallel" else ())
    expected = {
        "text": [{"text": "one\n\ntwo", "path": "x.1"}],
        "parallel": [{"1": word, "2": word} for word in ("one", "two")],
    }
    assert records(section) == expected.get(kind, [{"a": "one"}, {"a": "two"}])


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="ab é語😀\r\n", max_size=80), cut_at=st.integers(8, 20))
@example(text="aaaaa😀語\r\n", cut_at=8)
def test_pieces_of_long_lines_are_the_text(text, cut_at):
    content = text.encode()
    pieces = list(lines(corpus("x"), "x", io.BytesIO(content), cut_at=cut_at))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert all(len(piece.encode()) <= cut_at for piece in pieces)
    whole = list(lines(corpus("x"), "x", io.BytesIO(content)))
    assert whole == [line + b"\n" for line in ()] + [
        line.replace("\r\n", "\n") for line in io.StringIO(text, newline="\n")
    ]


def test_text_without_blank_lines_or_any_line_is_cut(tmp_path):
    words = [f"word{i}" for i in range(30_000)]
    for separator in ("\n", " "):
        (tmp_path / "a.txt").write_text(separator.join(words))
        found = records(corpus(tmp_path / "a.txt", "text", target="{text}"))
        assert len(found) >= 8 and max(len(record["text"]) for record in found) <= 32 * 1024
        assert " ".join(record["text"].strip() for record in found).split() == words


def test_a_line_that_would_not_fit_in_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.opening.MOST_LINE_BYTES", 50)
    write(tmp_path / "a.jsonl", "x", "y" * 100)
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has more than 50 bytes"):
        records(corpus(tmp_path))


def test_opened_files_can_be_sought_where_that_is_asked_for(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a.gz").write_bytes(gzip.compress(content, mtime=0))
    with opened(corpus("x"), f"file://{tmp_path}/a.gz", seekable=True) as file:
        file.seek(-3, io.SEEK_END)
        assert file.read() == content[-3:]
    table = pa.table({"a": ["x", "y"]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    Path(tmp_path / "t.parquet").unlink()
    assert records(corpus(tmp_path, "parquet")) == [{"a": "x"}, {"a": "y"}]
