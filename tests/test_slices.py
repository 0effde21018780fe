"""Slices of an evaluation: keys from every input, rows that are immutable, samples of every corpus."""

from types import SimpleNamespace

import pytest

from cluster.storage import Storage
from configs.errors import StorageError
from data.held_out import HeldOut
from jobs.results import samples
from jobs.slices import cut, read_rows, write_rows
from jobs.tasks.base import Example, LogLikelihood, Row


def pieces(checkpoint="a", size=4, tokens=8, version=1, indexes=range(10), target="t"):
    examples = [Example(HeldOut(i, f"s{i}", target, {}), (LogLikelihood(f"s{i}", target),)) for i in indexes]
    return cut("c", "likelihood", version, examples, size, tokens, {"checkpoint": checkpoint})


def test_keys_depend_on_every_input():
    reference = {piece.key for piece in pieces()}
    assert {piece.key for piece in pieces()} == reference and len(reference) == 3
    for change in ({"checkpoint": "b"}, {"tokens": 9}, {"version": 2}, {"indexes": range(20, 30)}, {"target": "u"}):
        assert not reference & {piece.key for piece in pieces(**change)}, change


def test_slices_keep_their_rows_and_are_immutable(tmp_path):
    folder, (piece, *_) = Storage(str(tmp_path)), pieces()
    assert read_rows(folder, piece) is None
    rows = [Row(i, ({"nll": [0.1 + i, 1e-17], "text": "ä\n"},), None if i else "ValueError: x") for i in range(4)]
    write_rows(folder, piece, rows)
    assert read_rows(folder, piece) == rows
    write_rows(folder, piece, rows[::-1])
    assert read_rows(folder, piece) == rows
    folder.write_bytes(piece.path, folder.read_bytes(piece.path)[:-9])
    with pytest.raises(StorageError, match="damaged"):
        read_rows(folder, piece)


def test_rows_of_other_records_are_refused(tmp_path):
    folder, (piece, *_) = Storage(str(tmp_path)), pieces()
    write_rows(folder, piece, [Row(i) for i in (0, 1, 2, 9)])
    with pytest.raises(StorageError, match="other records"):
        read_rows(folder, piece)


def test_samples_take_turns():
    def fake(corpus, outputs):
        examples = [Example(HeldOut(i, "s", "t", {}), ()) for i in range(len(outputs))]
        rows = [Row(i, (), None if text != "error" else "x") for i, text in enumerate(outputs)]
        task = SimpleNamespace(name="t", output=lambda example, row: outputs[row.index])
        answered = [(e, r) for e, r in zip(examples, rows, strict=True) if r.error is None]
        return SimpleNamespace(corpus=corpus, task=task, rows=rows, answered=lambda: answered)

    cells = [fake("a", ["1", "2", "3", "4"]), fake("b", ["error", "5"]), fake("c", [None])]
    chosen = [(sample["corpus"], sample["output"]) for sample in samples(cells, 4)]
    assert chosen == [("a", "1"), ("b", "5"), ("a", "2"), ("a", "3")]
    spread = [sample["output"] for sample in samples([fake("a", [str(i) for i in range(100)])], 4)]
    assert spread == ["0", "25", "50", "75"]
