"""Sources: what records are, and what is said about input that cannot be used."""

import ast
import gzip
import json
import unicodedata
from collections import Counter

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from configs.schema import CorpusSection
from data.extract import check_known_fields
from data.files import list_files
from data.sources import read_records
from data.templates import PairTemplate, cut_in_two


def corpus(path, kind="text", **more):
    fields = {"name": "c", "kind": kind, "path": str(path), "source": "{path}", "target": "{text}", **more}
    return CorpusSection(**fields)


def records(section):
    counts = Counter()
    return [record for file in list_files(section) for record in read_records(section, file, counts)], counts


MODULE = '''\
import os

@decorated
def outer(a, b=1) -> int:
    """Add two numbers together.

    More text.
    """
    # a comment that belongs to the body
    total = a + b

    def inner():
        "Count the calls made so far."
        nonlocal total
        total += 1
    inner()
    return total

class Thing:
    x = 1

    async def method(
        self,  # it
    ):
        """Short one."""
        async with self as me:
            return me

    def nothing(self):
        """Only a docstring stands here."""

    def one_line(self): """All on one line."""; return 1

    def plain(self):
        return 2
'''


def test_python_records_of_a_module_written_by_hand(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "notes.txt").write_text("no code")
    found, counts = records(corpus(tmp_path, "python"))
    outer, method, plain = found
    assert outer["name"] == "outer" and outer["signature"] == "def outer(a, b=1) -> int:"
    assert outer["summary"] == "Add two numbers together." and outer["docstring"].endswith("\n\nMore text.")
    assert outer["text"] == outer["docstring"] and outer["path"] == "m.py"
    assert outer["context"] == "import os\n\n@decorated\n"
    assert outer["body"].startswith("    # a comment that belongs") and outer["body"].endswith("    return total")
    assert method["signature"] == "async def method(\n    self,  # it\n):"
    assert method["body"] == "    async with self as me:\n        return me"
    assert method["summary"] == "" and method["text"] == "Short one."
    assert method["context"].endswith("class Thing:\nx = 1\n\n")
    assert counts == {
        "files that do not parse": 1,
        "functions that do not compile alone": 1,
        "functions without body": 2,
    }
    assert (plain["signature"], plain["body"]) == ("def plain(self):", "    return 2")
    assert plain["docstring"] == plain["summary"] == plain["text"] == ""


def test_every_record_of_the_standard_library_compiles_and_keeps_the_meaning():
    section = corpus("python://stdlib", "python", exclude=("[!a-c]*",))
    found, counts = records(section)
    assert len(found) > 300 and not counts["files that do not parse"]
    assert not any("test" in record["path"].split("/") or "site-packages" in record["path"] for record in found)
    for record in found:
        (function,) = ast.parse(record["signature"] + "\n" + record["body"]).body
        assert function.name == record["name"]
        assert len(record["context"]) <= 600 and (not record["context"] or record["context"].endswith("\n"))
        assert record["docstring"].startswith(record["summary"])
        assert record["docstring"] not in record["body"] or len(record["docstring"]) < 40


def test_text_becomes_groups_of_whole_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i} " + "word " * 60 for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md.gz").write_bytes(gzip.compress(b"One.\r\n\r\nTwo."))
    (tmp_path / ".hidden.txt").write_text("never read")
    found, _ = records(corpus(tmp_path))
    assert found[-1] == {"text": "One.\n\nTwo.", "path": "sub/b.md.gz"}
    own = [record["text"] for record in found if record["path"] == "a.txt"]
    assert "\n\n".join(own).split() == "\n\n".join(paragraphs).split()
    assert len(own) > 3 and all(text.startswith("Paragraph") for text in own)


def test_json_lines_keep_their_fields_and_spell_other_values(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "x", "n": 3, "l": [1, "é"], "z": null}\n\n{"q": "y"}\n')
    found, _ = records(corpus(tmp_path / "a.jsonl", "jsonl"))
    assert found == [{"q": "x", "n": "3", "l": '[1, "é"]', "z": ""}, {"q": "y"}]


def test_any_file_system_glob_and_exclude():
    memory = fsspec.filesystem("memory")
    for name in ("one.txt", "two.txt", "old/three.txt", "four.dat"):
        memory.pipe_file(f"/sources-test/{name}", name.encode())
    try:
        found, _ = records(corpus("memory://sources-test", exclude=("old",)))
        assert [record["path"] for record in found] == ["one.txt", "two.txt"]
        found, _ = records(corpus("memory://sources-test/*.dat"))
        assert found == [{"text": "four.dat", "path": "four.dat"}]
    finally:
        memory.rm("/sources-test", recursive=True)


def write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("a.txt", "abc\nd\u00e9f".encode("latin-1"), "text", r"a\.txt is not UTF-8 \(byte 5\).*iconv"),
        ("a.py", b"x = '\xe9'\n", "python", r"a\.py is not UTF-8 \(byte 5\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "jsonl", r"a\.jsonl line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "jsonl", r"a\.jsonl line 1 holds a list"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:20], "text", r"a\.txt\.gz is no complete gzip file"),
    ],
)
def test_unusable_content_is_named_with_its_place(tmp_path, name, content, kind, says):
    with pytest.raises(DataError, match=rf"data\.corpora\[c\]\.path: .*{says}"):
        records(corpus(write(tmp_path, name, content), kind))


def test_a_declared_encoding_is_honoured(tmp_path):
    source = '# -*- coding: latin-1 -*-\ndef f():\n    """Say déjà vu twice."""\n    return 1\n'
    found, _ = records(corpus(write(tmp_path, "a.py", source.encode("latin-1")), "python"))
    assert found[0]["summary"] == "Say déjà vu twice."


def test_missing_paths_and_folders_without_a_match_say_so(tmp_path):
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.path: .*nowhere does not exist; correct the path"):
        list_files(corpus(tmp_path / "nowhere"))
    write(tmp_path, "a.bin", b"x")
    with pytest.raises(DataError, match=r"no file of .* matches; kind 'jsonl' takes \.jsonl"):
        list_files(corpus(tmp_path, "jsonl"))
    with pytest.raises(DataError, match="python://stdlib is the only"):
        list_files(corpus("python://stdlob", "python"))
    with pytest.raises(DataError, match="fsspec cannot open"):
        list_files(corpus("nosuch://x"))


def test_templates_name_the_fields_there_are():
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.source: .*\{code\}.*fields there: body, context, docs"):
        check_known_fields(corpus("x", "python", source="{code}"), 64)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.target: .*names no field"):
        check_known_fields(corpus("x", target="constant"), 64)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.source: empty"):
        check_known_fields(corpus("x", source=""), 64)
    with pytest.raises(DataError, match=r"data\.corpora\[c\]\.target: .*is no template"):
        check_known_fields(corpus("x", target="{text"), 64)


def test_rendering_keeps_braces_and_drops_empty_targets():
    template = PairTemplate(corpus("x", source="{{go}} {path}:", target="{text}"), 64)
    assert template.render({"path": "p{0}", "text": "a{b}"}) == ("{go} p{0}:", "a{b}")
    assert template.render({"path": "p", "text": "  "}) is None


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="ab \n", max_size=60), most=st.integers(1, 40))
def test_cutting_in_two_loses_nothing_and_splits_no_word(text, most):
    first, second = cut_in_two(text, most)
    assert first + second == text and len(first) <= min(most, len(text) // 2)
    assert not first or (second[0].isspace() and not first[-1].isspace())


def test_scripts_without_blanks_are_cut_between_characters():
    text = "話す犬と猫がいました。" * 4
    first, second = cut_in_two(text, 100)
    assert first + second == text and len(text) // 2 - 2 <= len(first) <= len(text) // 2
    assert cut_in_two("한국어는띄어쓰기를합니다", 100)[0] == ""
    # Marks stay with the letter they stand on.
    thai = "ที่นี่มีน้ำ" * 3
    first, second = cut_in_two(thai, 100)
    assert first and not unicodedata.combining(second[0])


def test_continuation_reads_the_first_half_and_predicts_the_rest():
    template = PairTemplate(corpus("x", source="", continuation=True), 64)
    text = json.dumps(list(range(30)))
    source, target = template.render({"text": text})
    assert source + target == text and abs(len(source) - len(target)) < 8
    assert template.render({"text": "oneword"}) is None
