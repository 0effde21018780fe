"""Joules: counters of a made-up machine, their turn to zero, the estimate, and what evaluations say of both."""

import os
import time

import pytest

from cluster.storage import Storage
from data.held_out import HeldOut
from jobs import energy
from jobs.energy import Energy, Meter, counters
from jobs.results import Cell, energy_results
from jobs.slices import cut, read_energy, read_rows, write_rows
from jobs.tasks.base import Choices, Example, Generate, LogLikelihood, Row
from jobs.tasks.likelihood import Likelihood


def package(root, name, microjoules, title="package-0", top=1000):
    folder = root / name
    folder.mkdir()
    for file, value in (("name", title), ("energy_uj", microjoules), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


@pytest.fixture
def half_the_machine(monkeypatch):
    """This process uses half of the CPU time of the machine, two seconds of it."""
    own, whole = iter([1.0, 3.0]), iter([10.0, 14.0])
    monkeypatch.setattr(energy, "_process_seconds", lambda: next(own))
    monkeypatch.setattr(energy, "_machine_seconds", lambda: next(whole))


def test_counters_are_those_of_packages(tmp_path):
    package(tmp_path, "intel-rapl:0", 5)
    package(tmp_path, "intel-rapl:0:0", 5, title="core")
    package(tmp_path, "intel-rapl:1", 5, title="psys")
    assert [counter.file.parent.name for counter in counters(tmp_path)] == ["intel-rapl:0"]
    assert counters(tmp_path / "nothing") == []
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not to be read")
    assert counters(tmp_path) == []


def test_measured_is_a_share_of_all_packages_and_counters_turn(tmp_path, half_the_machine):
    first = package(tmp_path, "intel-rapl:0", 999_999_900, top=999_999_999)
    second = package(tmp_path, "intel-rapl:1", 0, "package-1")
    meter = Meter(tmp_path)
    first.write_text("9_999_900".replace("_", ""))
    second.write_text("0")
    # 100 microjoules to the top and 9,999,900 from zero are 10 J, of which half belongs to this process.
    found = meter.stop()
    assert found.joules == pytest.approx(5.0) and found.kind == "measured"


def test_estimated_is_cpu_time_times_watts(tmp_path, half_the_machine):
    found = Meter(tmp_path).stop()
    assert found.joules == pytest.approx(2.0 * 4.0) and found.kind == "estimated"


def test_a_process_that_computes_takes_energy_and_one_that_waits_does_not(tmp_path):
    meter = Meter(tmp_path)
    before = os.times()
    while os.times().user + os.times().system - before.user - before.system < 0.2:
        sum(range(10_000))
    used = meter.stop()
    assert 0.7 < used.joules < 4.0 * used.seconds * (os.cpu_count() or 1) + 1.0
    waiting = Meter(tmp_path)
    time.sleep(0.2)
    assert waiting.stop().joules < 0.5 * used.joules


def test_sums_do_not_mix_what_is_measured_with_what_is_not():
    measured, estimated = Energy(1.0, 2.0, "measured"), Energy(3.0, 4.0, "estimated")
    assert measured + measured == Energy(2.0, 4.0, "measured")
    assert measured + estimated == Energy(4.0, 6.0, "mixed")


def test_slices_keep_what_they_took(tmp_path):
    examples = [Example(HeldOut(i, "s", "t", {}), (Generate("s"),)) for i in range(2)]
    first, second = cut("c", "t", 1, examples, 1, 4, {})
    storage = Storage(str(tmp_path))
    write_rows(storage, first, [Row(0, ({"text": "x"},))], Energy(1.5, 2.0, "estimated"))
    write_rows(storage, second, [Row(1, ({"text": "y"},))])
    assert read_energy(storage, first) == Energy(1.5, 2.0, "estimated") and read_energy(storage, second) is None
    assert read_rows(storage, first) == [Row(0, ({"text": "x"},))]


def test_joules_per_record_and_token_by_hand():
    requests = (LogLikelihood("s", "t"), Choices("s", ("a", "b")), Generate("s"))
    answers = ({"labels": [1, 2, 3], "nll": []}, {"nll": [1, 2], "tokens": [2, 1]}, {"text": "x", "tokens": 4})
    cell = Cell("c", Likelihood(), [Example(HeldOut(0, "s", "t", {}), requests)], [], [Row(0, answers)])
    assert energy_results([cell]) == []
    cell.note(Energy(12.0, 1.0, "measured"))
    cell.note(Energy(8.0, 1.0, "measured"))
    (found,) = energy_results([cell])
    assert found["joules"] == 20.0 and found["tokens"] == 10 and found["joules_per_token"] == 2.0
    assert found["joules_per_record"] == 20.0 and found["kwh"] == pytest.approx(20 / 3.6e6)
    assert found["kind"] == "measured"
